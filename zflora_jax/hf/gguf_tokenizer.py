"""The tokenizer of a GGUF file, built from its metadata."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.gguf_config import SENTENCEPIECE_IDS
from zflora_jax.hf.gguf_reader import GGUFFile
from zflora_jax.hf.gguf_split import CUTS, pre_tokenizer

# Pre-tokenizers of byte-level vocabularies ("gpt2") whose texts llama.cpp starts with BOS where the
# file is silent (src/llama-vocab.cpp). Sentencepiece vocabularies ("llama") always start so, and
# with a space.
_STARTS_WITH_BOS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
    "chameleon",
)

# Those that leave a piece unmerged if it is a token.
_IGNORE_MERGES = tuple(name for name in _STARTS_WITH_BOS if name != "chameleon")

# transformers' name -> GGUF's, below "tokenizer.ggml.".
_KEYS = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
    **{
        name: name
        for name in ("tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id")
    },
}


def gguf_tokenizer(file: GGUFFile, config: LlamaConfig) -> Any:
    """Build the tokenizer of a GGUF file, with transformers' own converter.

    Args:
      file: the opened file.
      config: of its model; max_position_embeddings becomes model_max_length.

    Returns:
      A PreTrainedTokenizerFast with the file's chat template; None if the file has no vocabulary,
      and None with a warning if the vocabulary is of a kind that transformers does not know.

    Raises:
      CheckpointError: a metadata key cannot be read.
    """
    data = _vocabulary(file)
    if data is None:
        return None
    adds = _additions(file, data)
    try:
        tokenizer = _build(data, adds, config)
    except Exception as error:
        warnings.warn(
            f"{file.path}: its tokenizer ({data.get('tokenizer_type')!r}) could not be built"
            f" ({type(error).__name__}: {error}); the model has none.",
            stacklevel=4,
        )
        return None
    key = "tokenizer.chat_template"
    found = {name: file.get(f"{key}.{name}") for name in file.get(f"{key}s") or ()}
    named = {name: text for name, text in found.items() if text is not None}
    if (template := file.get(key)) is not None:
        tokenizer.chat_template = {"default": template} | named if named else template
    elif named:
        tokenizer.chat_template = named
    return tokenizer


def _vocabulary(file: GGUFFile) -> dict[str, Any] | None:
    """The vocabulary under the names that transformers' converter expects; None without one."""
    found = {name: file.get(f"tokenizer.ggml.{key}") for name, key in _KEYS.items()}
    data = {name: value for name, value in found.items() if value is not None}
    if "tokens" not in data:
        return None
    if data.get("tokenizer_type") == "gpt2":
        data.setdefault("merges", [])  # an empty array is not stored
    if data.get("tokenizer_type") == "llama":
        ids = {f"{name.removesuffix('nown')}_token_id": i for name, i in SENTENCEPIECE_IDS.items()}
        data = ids | data
    return data


def _additions(file: GGUFFile, data: dict[str, Any]) -> dict[str, bool]:
    """Whether the tokenizer adds BOS, EOS and a leading space to a text; llama.cpp's rule where the
    file is silent.
    """
    sentencepiece = data.get("tokenizer_type") == "llama"
    silent = {
        "bos_token": sentencepiece or data.get("pre_tokenizer_type") in _STARTS_WITH_BOS,
        "eos_token": False,
        "space_prefix": sentencepiece,
    }
    return {name: bool(file.get(f"tokenizer.ggml.add_{name}", v)) for name, v in silent.items()}


def _build(data: dict[str, Any], adds: dict[str, bool], config: LlamaConfig) -> Any:
    from transformers import PreTrainedTokenizerFast

    convert, cuts = _converter()
    backend, extra = convert("llama", data)
    cut = data.get("pre_tokenizer_type", "default")
    # The converter knows no digits, before transformers 5.24 no cut at all, and leaves that of
    # GPT-2 where it does not know one.
    if data.get("tokenizer_type") == "gpt2" and (cut in CUTS or cut not in cuts):
        backend.pre_tokenizer = pre_tokenizer(cut)
    if cut in _IGNORE_MERGES and hasattr(backend.model, "ignore_merges"):
        backend.model.ignore_merges = True
    special = {
        f"{name}_token": data["tokens"][data[f"{name}_token_id"]]
        for name in ("bos", "eos", "unk", "pad")
        if f"{name}_token_id" in data
    }
    added = {
        name: (special[name], data[f"{name}_id"]) if adds[name] and name in special else None
        for name in ("bos_token", "eos_token")
    }
    _add_bos_and_eos(backend, added["bos_token"], added["eos_token"])
    if data.get("tokenizer_type") == "llama" and not adds["space_prefix"]:
        _without_prefix(backend)
    settings = {
        "model_max_length": config.max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    extra = extra | {f"add_{name}": token is not None for name, token in added.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(extra | special | settings))


def _add_bos_and_eos(
    backend: Any, bos: tuple[str, int] | None, eos: tuple[str, int] | None
) -> None:
    """Make `backend` add these (token, id) pairs to texts.

    Its post-processor does it: every release of transformers reads that, and an export keeps it.
    """
    from tokenizers import processors

    first, last = ([token[0]] if token else [] for token in (bos, eos))
    template = [*first, "$A", *last]
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        pair=[*template, *(f"{part}:1" for part in (*first, "$B", *last))],
        special_tokens=[t for t in (bos, eos) if t],
    )


def _without_prefix(backend: Any) -> None:
    """Stop `backend` from adding a space before a text, and from taking one off decoded text."""
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="never", split=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _converter() -> tuple[Any, Any]:
    """transformers' converter from GGUF metadata to a `tokenizers` backend, and the cuts that it
    makes, by their names.

    It is imported from its own module: the public way (AutoTokenizer with gguf_file) needs torch.
    """
    try:
        found = importlib.import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
    except ImportError:  # transformers before 5.24
        found = importlib.import_module("transformers.integrations.ggml")
    return found.convert_gguf_tokenizer, getattr(found, "GGUF_PRE_TOKENIZER_SPLITS", {})
