"""Tokenizers in GGUF files: built from a file's metadata, and written as metadata."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.gguf.file import GGUFFile
from zflora_jax.hf.tokenizer import tokenizer_state

_KEY, _TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's token types
_END = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp stops at each of them
# llama.cpp's token ids of a sentencepiece vocabulary without names (src/llama-vocab.cpp).
SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}

# GGUF's name below "tokenizer.ggml." -> transformers' name, where they differ.
_NAMES = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}

# Regular expressions of the pieces that texts are cut into.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """What is done to a text before its tokens are merged."""

    cut: str  # regular expression; "" for GPT-2's, "digits" if each digit becomes a piece before it
    keeps_tokens: bool = False  # whether a piece that is a token is left unmerged
    adds_bos: bool = False  # whether llama.cpp starts a text with BOS if the file does not say


# llama.cpp's names (tokenizer.ggml.pre, src/llama-vocab.cpp) for the architectures that are loaded.
# A file without one has "default": GPT-2's in transformers and here; llama.cpp cuts more.
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "default"), PreTokenizer("")),
    "smollm": PreTokenizer("digits"),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"),
        PreTokenizer(_LLAMA3, keeps_tokens=True, adds_bos=True),
    ),
    "smaug-bpe": PreTokenizer(_LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), PreTokenizer(_QWEN2)),
    "tekken": PreTokenizer(_TEKKEN, keeps_tokens=True, adds_bos=True),
}


def gguf_tokenizer(file: GGUFFile, config: LlamaConfig) -> Any:
    """Builds the PreTrainedTokenizerFast of a GGUF file for its config; None without a vocabulary,
    and with a warning where the vocabulary or its pre-tokenizer is unknown.
    """
    values = file.below("tokenizer.")
    if values.get(f"{_KEY}tokens") is None:
        return None
    try:
        return _tokenizer(values, config)
    except Exception as error:
        warnings.warn(
            f"{file.path}: its tokenizer ({values.get(f'{_KEY}model')!r}) could not be built"
            f" ({type(error).__name__}: {error}); the model has none.",
            stacklevel=4,
        )
        return None


def _tokenizer(values: Mapping[str, Any], config: LlamaConfig) -> Any:
    """A tokenizer from the "tokenizer." keys of a file, by transformers' own converter."""
    from transformers import PreTrainedTokenizerFast

    data = {_NAMES.get(k := key.removeprefix(_KEY), k): values[key] for key in values}
    kind = data.get("tokenizer_type")
    if kind == "gpt2":
        data.setdefault("merges", [])  # an empty array is not stored
    if kind == "llama":
        data = SENTENCEPIECE_IDS | data
    backend, extra = _converter()("llama", data)
    row = PRE_TOKENIZERS.get(data.get("pre_tokenizer_type", "default"))
    if kind == "gpt2":  # whose converter knows few of the names, before transformers 5.24 none
        backend.pre_tokenizer = pre_tokenizer(data.get("pre_tokenizer_type", "default"))
        backend.model.ignore_merges = row is not None and row.keeps_tokens
    special = {
        f"{name}_token": data["tokens"][data[f"{name}_token_id"]]
        for name in ("bos", "eos", "unk", "pad")
        if f"{name}_token_id" in data
    }
    adds_bos = kind == "llama" or (row is not None and row.adds_bos)
    added = {
        name: (special[name], data[f"{name}_id"])
        for name, silent in (("bos_token", adds_bos), ("eos_token", False))
        if values.get(f"{_KEY}add_{name}", silent) and name in special
    }
    backend.post_processor = _special_adder(added)
    if kind == "llama" and not values.get(f"{_KEY}add_space_prefix", True):
        _without_prefix(backend)
    settings = {
        "model_max_length": config.max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{f"add_{name}": name in added for name in ("bos_token", "eos_token")},
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **(extra | special | settings))
    names = values.get(f"{_TEMPLATE}s") or ()
    templates = {n: text for n in names if (text := values.get(f"{_TEMPLATE}.{n}")) is not None}
    if (default := values.get(_TEMPLATE)) is not None:
        tokenizer.chat_template = {"default": default} | templates if templates else default
    elif templates:
        tokenizer.chat_template = templates
    return tokenizer


def _converter() -> Any:
    """transformers' converter from GGUF metadata to a `tokenizers` backend, from its own module:
    the public way (AutoTokenizer with gguf_file) needs torch.
    """
    try:
        found = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    except ImportError:  # transformers before 5.24
        found = importlib.import_module("transformers.integrations.ggml")
    return found.convert_gguf_tokenizer


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer (of the package tokenizers) that llama.cpp has under a name; ConfigError
    for one that is not in `PRE_TOKENIZERS`.
    """
    from tokenizers import Regex, pre_tokenizers

    known = ", ".join(PRE_TOKENIZERS)
    require(name in PRE_TOKENIZERS, f"pre-tokenizer {name!r} is not known; known are {known}.")
    cut = PRE_TOKENIZERS[name].cut
    if not cut:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    first: Any = pre_tokenizers.Digits(individual_digits=True)
    if cut != "digits":
        first = pre_tokenizers.Split(Regex(cut), behavior="isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut == "digits")
    return pre_tokenizers.Sequence([first, last])


def _special_adder(added: Mapping[str, tuple[str, int]]) -> Any:
    """The post-processor that adds the (token, id) of "bos_token" and "eos_token" to texts."""
    from tokenizers import processors

    first, last = ([added[n][0]] if n in added else [] for n in ("bos_token", "eos_token"))
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{part}:1" for part in (*first, "$B", *last))],
        special_tokens=list(added.values()),
    )


def _without_prefix(backend: Any) -> None:
    """Stops `backend` from adding a space before a text, and from removing one of decoded text."""
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="never", split=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


# Texts that a written tokenizer must read as the model's own does.
_PROBES = (
    "Hello, world! It's 12345.67 o'clock; don't we've I'LL",
    "x = [i**2 for i in range(10)]\n\tif (x != 7):\n\n    return None  # done\r\n",
    "na\u00efve caf\u00e9 \u00fcber \u043f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d \U0001f600",
    "the   three\n\n\nspaces ",
)
_WITHOUT = "Set model.tokenizer = None to write the file without one."


def tokenizer_metadata(model: Model, source: GGUFFile | None) -> tuple[dict[str, Any], str]:
    """The tokenizer keys of a model's GGUF file, and their origin for the report. The keys of
    `source`, the GGUF file that the model came from, are copied if it still has that tokenizer.
    ConfigError for a tokenizer that a file cannot express.
    """
    values, origin = _copied(model, source), "copied from the base's file"
    if values is None:
        if model.tokenizer is None:
            return {f"{_KEY}model": "no_vocab"}, "none: the model has none"
        values, origin = _built(model)
    size = len(values[f"{_KEY}tokens"])
    require(
        size == model.config.vocab_size,
        f"the tokenizer has {size} tokens, the model's vocabulary {model.config.vocab_size}; give"
        " the model the tokenizer that it was trained with.",
    )
    values, note = _with_end(_with_templates(values, model.tokenizer), model.config)
    if model.tokenizer is not None:
        _check(values, model)
    return values, origin + note


def _check(values: dict[str, Any], model: Model) -> None:
    """ConfigError if the metadata give other tokens than the model's tokenizer."""
    found, texts = _tokenizer(values, model.config), list(_PROBES)
    if values[f"{_KEY}model"] != "llama":
        texts += [f"one {token} two" for token in model.tokenizer.all_special_tokens[:4]]
    # After a special token of a sentencepiece vocabulary llama.cpp adds a space; transformers'
    # tokenizers differ.
    for text in texts:
        want, got = model.tokenizer(text)["input_ids"], found(text)["input_ids"]
        require(
            got == want,
            f"the model's tokenizer cannot be expressed in a GGUF file: {text!r} gives {want}, read"
            f" back from the file {got}. {_WITHOUT[:-1]}, or export a Hugging Face directory"
            " (--format hf).",
        )


def _copied(model: Model, source: GGUFFile | None) -> dict[str, Any] | None:
    """The keys of the base's file, with names for new rows; None where there are none, or the model
    has another tokenizer now.
    """
    if source is None or source.get(f"{_KEY}tokens") is None:
        return None
    if model.tokenizer is not None:
        before = tokenizer_state(gguf_tokenizer(source, model.config))
        now = tokenizer_state(model.tokenizer)
        names = ("backend", "vocabulary", "special")
        if before is None or now is None or any(before[name] != now[name] for name in names):
            return None
    values = source.below("tokenizer.")
    new = range(len(values[f"{_KEY}tokens"]), model.config.vocab_size)
    least = min(values.get(f"{_KEY}scores", (0.0,)))
    for name, more in (
        ("tokens", [f"[PAD{i}]" for i in new]),
        ("token_type", [_UNUSED for _ in new]),
        ("scores", [least for _ in new]),
    ):
        if _KEY + name in values:
            values[_KEY + name] = [*values[_KEY + name], *more]
    return values


def _with_templates(values: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`values` with the chat templates of `tokenizer`, if there is one."""
    if tokenizer is None:
        return values
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    values = {key: value for key, value in values.items() if not key.startswith(_TEMPLATE)}
    if "default" in templates:
        values[_TEMPLATE] = templates["default"]
    if more := [name for name in templates if name != "default"]:
        values[f"{_TEMPLATE}s"] = more
    return values | {f"{_TEMPLATE}.{name}": templates[name] for name in more}


def _with_end(values: dict[str, Any], config: LlamaConfig) -> tuple[dict[str, Any], str]:
    """(`values` with the end tokens of `config`; a note on those for which there is no key.)"""
    given = [values[_KEY + name] for name in _END if _KEY + name in values]
    ends = list(config.eos_token_ids)
    if list(dict.fromkeys(given)) == ends:
        return values, ""
    values = {key: value for key, value in values.items() if key.removeprefix(_KEY) not in _END}
    values |= {_KEY + name: token for name, token in zip(_END, ends, strict=False)}
    left = ends[len(_END) :]
    return values, f"; end tokens without a place in the file: {left}" if left else ""


def _built(model: Model) -> tuple[dict[str, Any], str]:
    """The keys for a transformers tokenizer, and where they come from."""
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = {"model": {"type": None}} if backend is None else json.loads(backend.to_str())
    require(
        state["model"]["type"] == "BPE" and not state["model"].get("byte_fallback"),
        f"the tokenizer ({type(tokenizer).__name__}, model {state['model']['type']}) is no"
        " byte-level BPE, the one type that is written into a GGUF file. Load the base from a .gguf"
        " file, whose tokenizer is copied; or export a Hugging Face directory (--format hf) and"
        f" convert it with llama.cpp's convert_hf_to_gguf.py. {_WITHOUT}",
    )
    size = model.config.vocab_size
    tokens, types = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size  # ids without a token
    for token, i in tokenizer.get_vocab().items():
        require(
            i < size,
            f"the tokenizer's token {token!r} has the id {i}, the model's vocabulary only {size};"
            " give the model the tokenizer that it was trained with.",
        )
        tokens[i], types[i] = token, _NORMAL
    for i, token in tokenizer.added_tokens_decoder.items():
        types[i] = _CONTROL if token.special else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    name = _pre_tokenizer_name(state)
    values = {"model": "gpt2", "pre": name, "tokens": tokens, "token_type": types, "merges": merges}
    origin = f"written as a byte-level vocabulary, pre-tokenizer {name}"
    origin += "" if merges else "; llama.cpp refuses one without merges"
    if state["normalizer"] is not None:
        origin += f"; the file has no place for the normalizer {state['normalizer']['type']}"
    values |= _special(tokenizer, model.config)
    return {_KEY + key: value for key, value in values.items()}, origin


def _pre_tokenizer_name(state: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer in a tokenizer.json."""
    if not state["model"]["merges"]:
        return "gpt-2"  # bytes alone: cutting changes nothing
    normalizer = state["normalizer"]
    require(
        normalizer is None or normalizer["type"] == "NFC",
        f"the tokenizer normalises texts ({normalizer}), which a GGUF file cannot express."
        f" {_WITHOUT}",
    )
    steps, keeps = _steps(state["pre_tokenizer"]), bool(state["model"].get("ignore_merges"))
    for name, row in PRE_TOKENIZERS.items():
        known = _steps(json.loads(pre_tokenizer(name).__getstate__()))
        if row.keeps_tokens == keeps and steps == known:
            return name
    raise ConfigError(
        f"the tokenizer's pre_tokenizer {state['pre_tokenizer']} (ignore_merges: {keeps}) is none"
        f" that can be named in a GGUF file: {', '.join(PRE_TOKENIZERS)}. {_WITHOUT}"
    )


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without a setting that changes offsets only."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    return [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]


def _special(tokenizer: Any, config: LlamaConfig) -> dict[str, Any]:
    """Ids of special tokens, and whether texts start with BOS and end with EOS."""
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
    return {name: i for name, i in ids.items() if i is not None} | {
        "add_bos_token": whole[:1] == [bos] != plain[:1],
        "add_eos_token": whole[-1:] == [tokenizer.eos_token_id] != plain[-1:],
    }
