"""Metadata of a GGUF file that describe a tokenizer: the source file's own, or written from a
transformers tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.gguf_config import gguf_config
from zflora_jax.hf.gguf_merges import merges_as_scores
from zflora_jax.hf.gguf_reader import GGUFFile
from zflora_jax.hf.gguf_split import pre_tokenizer_name, prefix_space
from zflora_jax.hf.gguf_tokenizer import gguf_tokenizer
from zflora_jax.hf.load import locate
from zflora_jax.hf.tokenizer import tokenizer_state

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_KEY = "tokenizer.ggml."
_END = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp stops at each of them
# What a written tokenizer must read as the model's own does, beside its special tokens.
_PROBES = (
    "Hello, world! It's 12345.67 o'clock; don't we've I'LL",
    "x = [i**2 for i in range(10)]\n\tif (x != 7):\n\n    return None  # done\r\n",
    "na\u00efve caf\u00e9 \u00fcber \u043f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d \U0001f600",
    "the   three\n\n\nspaces ",
)


def tokenizer_metadata(model: Model) -> tuple[dict[str, Any], str]:
    """The tokenizer keys of a model's GGUF file.

    Args:
      model: whose tokenizer it is; where its source is a .gguf file with the same tokenizer, that
        file's keys are copied.

    Returns:
      (key -> value, where they come from, for the report).

    Raises:
      ConfigError: the tokenizer cannot be expressed in a GGUF file.
    """
    values, origin = _copied(model), "copied from the base's file"
    if values is None and model.tokenizer is None:
        return {f"{_KEY}model": "no_vocab"}, "none: the model has none"
    if values is None:
        values, origin = _built(model)
    size = len(values[f"{_KEY}tokens"])
    require(
        size == model.config.vocab_size,
        f"the tokenizer has {size} tokens, the model's vocabulary {model.config.vocab_size}; give"
        " the model the tokenizer that it was trained with.",
    )
    values, note = _with_end(_with_template(values, model.tokenizer), model.config)
    return values, origin + note


def check_tokenizer(path: Path, model: Model) -> None:
    """Check that the tokenizer that a file describes reads texts as the model's own does.

    Args:
      path: of a GGUF file.
      model: with a tokenizer, or without one, in which case there is nothing to check.

    Raises:
      ConfigError: a text gives other tokens.
    """
    if model.tokenizer is None:
        return
    file = GGUFFile(path)
    found = gguf_tokenizer(file, gguf_config(file))
    texts = list(_PROBES)
    if file.get(f"{_KEY}model") != "llama":
        texts += [f"one {token} two" for token in model.tokenizer.all_special_tokens[:4]]
    # Whether a space is added behind a special token, as at the start of a text, is not in the file
    # of a sentencepiece vocabulary: llama.cpp adds one, and transformers' tokenizers differ.
    for text in texts:
        want = model.tokenizer(text)["input_ids"]
        got = None if found is None else found(text)["input_ids"]
        if got != want:
            raise ConfigError(
                f"the model's tokenizer cannot be expressed in a GGUF file: {text!r} gives {want},"
                f" read back from the file {got}. Set model.tokenizer = None to write the file"
                " without one, or export a Hugging Face directory (--format hf)."
            )


def _copied(model: Model) -> dict[str, Any] | None:
    """The keys of the file that the model came from; None where there is none, or the model has
    another tokenizer now.
    """
    file = source_file(model)
    if file is None or file.get(f"{_KEY}tokens") is None:
        return None
    names = ("backend", "vocabulary", "special")
    if model.tokenizer is not None:
        own = tokenizer_state(gguf_tokenizer(file, gguf_config(file)))
        now = tokenizer_state(model.tokenizer)
        if own is None or now is None or any(own[name] != now[name] for name in names):
            return None
    return _filled(file.below("tokenizer."), model.config.vocab_size)


def _filled(values: dict[str, Any], size: int) -> dict[str, Any]:
    """`values` with names for the rows of a vocabulary that was made longer by a number."""
    tokens, types = _unused(len(values[f"{_KEY}tokens"]), size)
    scores = [min(values.get(f"{_KEY}scores", (0.0,)))] * len(tokens)
    new: dict[str, list[Any]] = {"tokens": tokens, "token_type": types, "scores": scores}
    return values | {
        f"{_KEY}{name}": [*values[f"{_KEY}{name}"], *more]
        for name, more in new.items()
        if f"{_KEY}{name}" in values
    }


def source_file(model: Model) -> GGUFFile | None:
    """The GGUF file that a model came from; None where there is none, or it is gone."""
    if model.source is None:
        return None
    try:
        path = locate(model.source)[0]
        return GGUFFile(path) if path.suffix == ".gguf" else None
    except CheckpointError:  # moved away, or the hub cannot be reached
        return None


def _with_template(values: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`values` with the chat templates of `tokenizer`, if there is one."""
    if tokenizer is None:
        return values
    key = "tokenizer.chat_template"
    values = {name: value for name, value in values.items() if not name.startswith(key)}
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    more = [name for name in templates if name != "default"]
    if "default" in templates:
        values[key] = templates["default"]
    if more:
        values[f"{key}s"] = more
    return values | {f"{key}.{name}": templates[name] for name in more}


def _with_end(values: dict[str, Any], config: LlamaConfig) -> tuple[dict[str, Any], str]:
    """(`values` with the end tokens of `config`, a note on those that have no place)."""
    given = [values[key] for name in _END if (key := f"{_KEY}{name}") in values]
    ends = list(config.eos_token_ids)
    if list(dict.fromkeys(given)) == ends:
        return values, ""
    values = {key: value for key, value in values.items() if key.removeprefix(_KEY) not in _END}
    values |= {f"{_KEY}{name}": token for name, token in zip(_END, ends, strict=False)}
    left = ends[len(_END) :]
    return values, f"; end tokens without a place in the file: {left}" if left else ""


def _built(model: Model) -> tuple[dict[str, Any], str]:
    """The keys for a transformers tokenizer."""
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = None if backend is None else json.loads(backend.to_str())
    require(
        state is not None and state["model"]["type"] == "BPE",
        f"the tokenizer is a {type(tokenizer).__name__}"
        f"{'' if state is None else ' of the kind ' + state['model']['type']}; a GGUF file of these"
        " architectures holds BPE of the `tokenizers` library. Load its fast form, or set"
        " model.tokenizer = None.",
    )
    assert state is not None
    tokens, types = _tokens(tokenizer, model.config.vocab_size)
    values: dict[str, Any] = {f"{_KEY}tokens": tokens}
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in state["model"]["merges"]
    ]
    if state["model"].get("byte_fallback"):
        types = [
            _BYTE if len(token) == 6 and token.startswith("<0x") else kind
            for token, kind in zip(tokens, types, strict=True)
        ]
        values |= {f"{_KEY}model": "llama", f"{_KEY}pre": "default"}
        values |= {f"{_KEY}scores": merges_as_scores(tokens, types, merges)}
        values |= {f"{_KEY}add_space_prefix": prefix_space(state)}
        origin = "written as a sentencepiece vocabulary, scores in the order of the merges"
        if values[f"{_KEY}add_space_prefix"]:
            origin += "; llama.cpp adds a space behind special tokens too"
    else:
        pre = pre_tokenizer_name(state)
        values |= {f"{_KEY}model": "gpt2", f"{_KEY}pre": pre}
        values |= {f"{_KEY}merges": [" ".join(merge) for merge in merges]}
        origin = f"written as a byte-level vocabulary, pre-tokenizer {pre}"
        origin += "" if merges else "; llama.cpp refuses one without merges"
        if state["normalizer"] is not None:
            origin += f"; the file has no place for the normalizer {state['normalizer']['type']}"
    if tokenizer.unk_token_id is not None and values[f"{_KEY}model"] == "llama":
        types[tokenizer.unk_token_id] = _UNKNOWN
    values[f"{_KEY}token_type"] = types
    return values | _special(tokenizer, model.config), origin


def _unused(first: int, size: int) -> tuple[list[str], list[int]]:
    """(the texts, the types) of places that are never used, from id `first` to `size` - 1."""
    return [f"[PAD{i}]" for i in range(first, size)], [_UNUSED] * (size - first)


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """(the text, the type) of every token; ids without one get a place that is never used."""
    tokens, types = _unused(0, size)
    added = tokenizer.added_tokens_decoder
    for token, i in tokenizer.get_vocab().items():
        require(
            i < size,
            f"the tokenizer's token {token!r} has the id {i}, the model's vocabulary only {size};"
            " give the model the tokenizer that it was trained with.",
        )
        tokens[i], types[i] = token, _NORMAL
    for i, token in added.items():
        types[i] = _CONTROL if token.special else _USER_DEFINED
    return tokens, types


def _special(tokenizer: Any, config: LlamaConfig) -> dict[str, Any]:
    """Ids of special tokens, and whether texts are given them."""
    bos = config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pad = config.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = {
        "bos_token_id": bos,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": pad,
    }
    whole = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    adds = {
        (first, last): [*([bos] if first else []), *plain, *([ids["eos_token_id"]] if last else [])]
        for first in (False, True)
        for last in (False, True)
    }
    found = [key for key, value in adds.items() if value == whole]
    require(
        bool(found),
        f"the tokenizer reads 'a' as {whole}, without special tokens as {plain}: a GGUF file can"
        f" only add BOS ({bos}) before a text and EOS ({ids['eos_token_id']}) behind it.",
    )
    first, last = found[0]
    values = {f"{_KEY}{name}": i for name, i in ids.items() if i is not None}
    return values | {f"{_KEY}add_bos_token": first, f"{_KEY}add_eos_token": last}
