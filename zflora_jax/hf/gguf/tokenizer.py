"""Tokenizers in GGUF files: built from a file's metadata, and written as metadata."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.gguf.file import GGUFFile
from zflora_jax.hf.tokenizer import tokenizer_state

TOKENIZER, _TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's token types
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp stops at each of them
# llama.cpp's token ids of a sentencepiece vocabulary without names (src/llama-vocab.cpp).
SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}

# transformers' names of special tokens -> GGUF's.
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

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
    """The steps before a text's tokens are merged."""

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
    """Builds the PreTrainedTokenizerFast of a GGUF file for its config. Returns None without a
    vocabulary, or with a warning if the vocabulary or its pre-tokenizer is unknown.
    """
    values = file.below("tokenizer.")
    if values.get(f"{TOKENIZER}tokens") is None:
        return None
    try:
        return _tokenizer(values, config)
    except Exception as error:
        warnings.warn(
            f"{file.path}: its tokenizer ({values.get(f'{TOKENIZER}model')!r}) could not be built"
            f" ({type(error).__name__}: {error}); the model has none.",
            stacklevel=4,
        )
        return None


def _tokenizer(values: Mapping[str, Any], config: LlamaConfig) -> Any:
    """A tokenizer from the "tokenizer." keys of a file."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    given = {key.removeprefix(TOKENIZER): value for key, value in values.items()}
    kind, row = given.get("model"), PRE_TOKENIZERS.get(given.get("pre", ""), PreTokenizer(""))
    if kind == "llama":
        given = SENTENCEPIECE_IDS | given
    backend = _backend(given)
    special = {
        f"{name}_token": given["tokens"][given[f"{key}_token_id"]]
        for name, key in _SPECIAL.items()
        if f"{key}_token_id" in given
    }
    adds = {"bos_token": kind == "llama" or row.adds_bos, "eos_token": False}  # defaults
    added = {
        name: (special[name], given[f"{name}_id"])
        for name, silent in adds.items()
        if given.get(f"add_{name}", silent) and name in special
    }
    first, last = ([added[name][0]] if name in added else [] for name in adds)
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last], special_tokens=list(added.values())
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
        **{f"add_{name}": name in added for name in adds},
    )
    tokenizer.chat_template = values.get(_TEMPLATE)
    return tokenizer


def _backend(given: Mapping[str, Any]) -> Any:
    """The `tokenizers` backend. transformers' converter adds tokens of GPT-2 and Llama 2, and omits
    special ones beyond the byte alphabet.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import generate_merges

    kind, tokens = given.get("model"), given["tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if kind == "gpt2":  # merges: an empty array is not stored
        name, merges = given.get("pre", "default"), given.get("merges", [])
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
        backend.pre_tokenizer, backend.decoder = pre_tokenizer(name), decoders.ByteLevel()
        backend.model.ignore_merges = PRE_TOKENIZERS[name].keeps_tokens
    else:
        require(kind == "llama", f"{kind!r} is not known; known are 'gpt2' and 'llama'.")
        merges = generate_merges(vocab, dict(zip(tokens, given["scores"], strict=True)))
        model = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True)
        backend, space = Tokenizer(model), given.get("add_space_prefix", True)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="▁", prepend_scheme="first" if space else "never", split=False
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", left=1)] * space)
    typed = list(zip(tokens, given.get("token_type", []), strict=False))
    special = [AddedToken(t, normalized=False, special=True) for t, n in typed if n == _CONTROL]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(t, normalized=False) for t, n in typed if n == _USER_DEFINED])
    size = backend.get_vocab_size()
    require(size == len(tokens), f"{len(tokens)} tokens are listed, but only {size} differ.")
    return backend


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer (of the package tokenizers) for llama.cpp's name; ConfigError for a name
    that is not in `PRE_TOKENIZERS`.
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


# --- writing --------------------------------------------------------------------------------------

# Texts that a written tokenizer must read like the model's tokenizer.
_PROBES = (
    "Hello, world! It's 12345.67 o'clock; don't we've I'LL",
    "x = [i**2 for i in range(10)]\n\tif (x != 7):\n\n    return None  # done\r\n",
    "naïve café über привет 你好 😀",
    "the   three\n\n\nspaces ",
)
_REMEDY = (
    "Convert a Hugging Face export (--format hf) with llama.cpp's convert_hf_to_gguf.py, load the"
    " base from a .gguf file, whose tokenizer is copied, or set model.tokenizer = None."
)


def tokenizer_metadata(model: Model, source: GGUFFile | None) -> tuple[dict[str, Any], str]:
    """The tokenizer keys of a model's file, and their origin for the report. They are copied from
    `source`, the GGUF file that the model came from, if it still has that tokenizer; else they
    describe a byte-level BPE. ConfigError for a tokenizer that a file cannot express.
    """
    values, origin = _copied(model, source), "copied from the base's file"
    if values is None:
        if model.tokenizer is None:
            return {f"{TOKENIZER}model": "no_vocab"}, "none: the model has none"
        values = _built(model)
        origin = f"written as a byte-level vocabulary, pre-tokenizer {values['pre']}"
        values = {TOKENIZER + key: value for key, value in values.items()}
    size, ends = len(values[f"{TOKENIZER}tokens"]), model.config.eos_token_ids
    require(
        size == model.config.vocab_size,
        f"the tokenizer has {size} tokens, the model's vocabulary {model.config.vocab_size}; give"
        " the model the tokenizer that it was trained with.",
    )
    require(
        len(ends) <= len(END_IDS),
        f"eos_token_ids={ends}: a GGUF file has room for {len(END_IDS)} end tokens.",
    )
    values = {key: v for key, v in values.items() if key.removeprefix(TOKENIZER) not in END_IDS}
    values |= {TOKENIZER + name: token for name, token in zip(END_IDS, ends, strict=False)}
    if model.tokenizer is not None:
        template = model.tokenizer.chat_template
        values[_TEMPLATE] = template.get("default") if isinstance(template, dict) else template
        values = {key: value for key, value in values.items() if value is not None}
        _check(values, model)
    return values, origin


def _check(values: dict[str, Any], model: Model) -> None:
    """Raises ConfigError if the metadata give other tokens than the model's tokenizer."""
    found, texts = _tokenizer(values, model.config), list(_PROBES)
    if values[f"{TOKENIZER}model"] != "llama":
        texts += [f"one {token} two" for token in model.tokenizer.all_special_tokens[:4]]
    # After a special token of a sentencepiece vocabulary llama.cpp adds a space; transformers'
    # tokenizers differ.
    for text in texts:
        want, got = model.tokenizer(text)["input_ids"], found(text)["input_ids"]
        require(
            got == want,
            f"the model's tokenizer cannot be expressed in a GGUF file: {text!r} gives {want}, read"
            f" back from the file {got}. {_REMEDY}",
        )


def _copied(model: Model, source: GGUFFile | None) -> dict[str, Any] | None:
    """The keys of the base's file, with names for new rows; None if there are none, or the model
    now has another tokenizer.
    """
    if source is None or source.get(f"{TOKENIZER}tokens") is None:
        return None
    if model.tokenizer is not None:
        before = tokenizer_state(gguf_tokenizer(source, model.config)) or {}
        now = tokenizer_state(model.tokenizer) or {}
        names = ("backend", "vocabulary", "special")
        if any(before.get(name) != now.get(name) for name in names):
            return None
    values = source.below("tokenizer.")
    new = range(len(values[f"{TOKENIZER}tokens"]), model.config.vocab_size)
    for name, more in (
        ("tokens", [f"[PAD{i}]" for i in new]),
        ("token_type", [_UNUSED for _ in new]),
        ("scores", [-1000.0 for _ in new]),
    ):
        if TOKENIZER + name in values:
            values[TOKENIZER + name] = [*values[TOKENIZER + name], *more]
    return values


def _built(model: Model) -> dict[str, Any]:
    """The keys, below `TOKENIZER`, for a byte-level BPE of transformers."""
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: Any = {"model": {"type": None}} if backend is None else json.loads(backend.to_str())
    require(
        state["model"]["type"] == "BPE" and not state["model"].get("byte_fallback"),
        f"the tokenizer ({type(tokenizer).__name__}, model {state['model']['type']}) is no"
        f" byte-level BPE, the one type that is written into a GGUF file. {_REMEDY}",
    )
    vocabulary = tokenizer.get_vocab()
    size = max(model.config.vocab_size, 1 + max(vocabulary.values()))
    tokens, types = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size  # ids without a token
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, _NORMAL
    for i, token in tokenizer.added_tokens_decoder.items():
        types[i] = _CONTROL if token.special else _USER_DEFINED
    bos = model.config.bos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pad = model.config.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = tokenizer("a")["input_ids"]
    values = {
        "model": "gpt2",
        "pre": _pre_tokenizer_name(state),
        "tokens": tokens,
        "token_type": types,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]],
        "bos_token_id": bos,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": pad,
        "add_bos_token": ids[0] == bos,
        "add_eos_token": ids[-1] == tokenizer.eos_token_id,
    }
    return {name: value for name, value in values.items() if value is not None}


def _pre_tokenizer_name(state: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer in a tokenizer.json."""
    if not state["model"]["merges"]:
        return "gpt-2"  # bytes alone: cutting changes nothing
    normalizer = state["normalizer"]
    require(
        normalizer is None or normalizer["type"] == "NFC",  # Qwen's, which llama.cpp leaves out
        f"the tokenizer normalises texts ({normalizer}), which a GGUF file cannot express."
        f" {_REMEDY}",
    )
    steps, keeps = _steps(state["pre_tokenizer"]), bool(state["model"].get("ignore_merges"))
    for name, row in PRE_TOKENIZERS.items():
        known = _steps(json.loads(pre_tokenizer(name).__getstate__()))
        if row.keeps_tokens == keeps and steps == known:
            return name
    raise ConfigError(
        f"the tokenizer's pre_tokenizer {state['pre_tokenizer']} (ignore_merges: {keeps}) is none"
        f" that can be named in a GGUF file: {', '.join(PRE_TOKENIZERS)}. {_REMEDY}"
    )


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without a setting that changes offsets only."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    return [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]
