"""How a tokenizer cuts a text before it merges, as llama.cpp names it (tokenizer.ggml.pre)."""

from __future__ import annotations

from typing import Any

from zflora_jax.core.fields import ConfigError, require

# Names of pre-tokenizers in llama.cpp (src/llama-vocab.cpp) -> the cut that they make. "digits":
# every digit apart, then as GPT-2 does. "default", which files without a name have too, is GPT-2's
# as in transformers; llama.cpp also takes punctuation and long numbers apart, and warns.
CUTS = {
    **dict.fromkeys(
        (
            *("gpt-2", "default", "phi-2", "mpt", "olmo", "jais", "trillion", "mellum", "a.x-4.0"),
            *("gigachat", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "modern-bert"),
            "granite-docling",
        ),
        "gpt2",
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        "digits",
    ),
    **dict.fromkeys(
        (
            *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
            *("lfm2", "jina-v5-nano", "dbrx", "smaug-bpe"),
        ),
        "llama3",
    ),
    **dict.fromkeys(
        (
            *("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan"),
            "solar-open",
        ),
        "qwen2",
    ),
}
# Regular expressions of tokenizer.json -> the cut. Llama 3's and Qwen2's differ in how many digits
# make a piece.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama3",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
# (cut, whether a piece that is a token is left unmerged) -> llama.cpp's name.
_NAMES: dict[tuple[str | None, bool], str] = {
    ("gpt2", False): "gpt-2",
    ("digits", False): "smollm",
    ("llama3", True): "llama-bpe",
    ("llama3", False): "smaug-bpe",
    ("qwen2", False): "qwen2",
}


def pre_tokenizer(name: str) -> Any:
    """The pre-tokenizer (of the package tokenizers) that cuts as llama.cpp's of that name.

    Raises:
      ConfigError: the name is none of `CUTS`.
    """
    from tokenizers import Regex, pre_tokenizers

    require(name in CUTS, f"pre-tokenizer {name!r} is not known; known are {', '.join(CUTS)}.")
    if (cut := CUTS[name]) == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut == "digits":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pattern = next(pattern for pattern, made in _SPLITS.items() if made == cut)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_])


def pre_tokenizer_name(state: dict[str, Any]) -> str:
    """llama.cpp's name of a byte-level pre-tokenizer.

    Args:
      state: tokenizer.json of a BPE without byte_fallback.

    Raises:
      ConfigError: none of llama.cpp's that this project knows cuts so, or the text is changed
        before it is cut in a way that llama.cpp does not have.
    """
    if not state["model"]["merges"]:
        return "gpt-2"  # bytes alone: cutting changes nothing
    normalizer = state["normalizer"]
    require(
        normalizer is None or normalizer["type"] == "NFC",
        f"the tokenizer normalises texts ({normalizer}), which a GGUF file cannot express. Set"
        " model.tokenizer = None to write the file without one.",
    )
    cut, ignores = _cut(state["pre_tokenizer"]), bool(state["model"].get("ignore_merges"))
    if (cut, ignores) in _NAMES:
        return _NAMES[cut, ignores]
    raise ConfigError(
        f"the tokenizer's pre_tokenizer {state['pre_tokenizer']} (ignore_merges: {ignores}) is none"
        f" that can be named in a GGUF file: {', '.join(_NAMES.values())}. Set model.tokenizer ="
        " None to write the file without one."
    )


def prefix_space(state: dict[str, Any]) -> bool:
    """Whether a tokenizer with byte_fallback puts a space before a text.

    Args:
      state: its tokenizer.json.

    Raises:
      ConfigError: it treats texts otherwise than sentencepiece does.
    """
    steps = [*_steps(state["normalizer"]), *_steps(state["pre_tokenizer"])]
    prepends, replaces = False, False
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prepends = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                replaces = True
            case {"type": "Metaspace", "replacement": "\u2581"} if not step.get("split", True):
                prepends, replaces = step.get("prepend_scheme", "always") != "never", True
            case _:
                replaces = False
                break
    require(
        replaces,
        f"the tokenizer cuts or changes texts by {steps}, which a sentencepiece vocabulary of a"
        " GGUF file cannot express. Set model.tokenizer = None to write the file without one.",
    )
    return prepends


def _cut(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The name of a cut; None for one that is unknown."""
    match _steps(pre_tokenizer):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return "digits"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return _SPLITS.get(pattern)
    return None


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after the other."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for key in ("normalizers", "pretokenizers") for step in part.get(key, ())]
