"""Tokenizer files of an export: the base's, byte for byte, or written from the tokenizer if it
differs, so that transformers 4 and 5 read the same tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zflora_jax.core.errors import CheckpointError
from zflora_jax.hf.shards import inside, read_json
from zflora_jax.reporting.files import write_json

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"  # folder of transformers for all but the default one
_FILES = ("vocab_file", "merges_file", "tokenizer_file")
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ADDED = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def load_tokenizer(directory: Path) -> Any:
    """Loads a directory's tokenizer without custom code; None if it has no tokenizer files.
    CheckpointError if they cannot be loaded, or a link leads out of the directory.
    """
    files = (path for path in directory.iterdir() if path.name == TEMPLATES or not path.is_dir())
    for path in (*files, *(directory / TEMPLATES).glob("*")):
        inside(directory, str(path.relative_to(directory)), missing_ok=True)
    settings = directory / "tokenizer_config.json"
    for key, value in read_json(settings).items() if settings.exists() else ():
        # transformers 4 opens the files that these settings name, from the working directory too.
        named = Path(value) if key in _FILES and isinstance(value, str) else None
        if named and named.is_file() and not named.resolve().is_relative_to(directory.resolve()):
            raise CheckpointError(
                f"{settings}: {key}={value!r} is outside of the directory; remove that key."
            )
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((directory / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be loaded ({type(error).__name__}: {error}). Repair"
            " or remove its files; a model loads without them."
        ) from error


def write_tokenizer_files(folder: Path, tokenizer: Any, base: Path | None) -> None:
    """Writes a tokenizer into an export: copies of the files in `base`, the model's source
    directory, if they give this tokenizer, else new files.
    """
    names = [name for name in TOKENIZER_FILES if base and (base / name).is_file()]
    own = load_tokenizer(base) if base and tokenizer is not None else None
    if base and names and tokenizer_state(own) == tokenizer_state(tokenizer):
        for path in (*(base / name for name in names), *(base / TEMPLATES).glob("*.jinja")):
            _copy(path, base, folder)
    elif tokenizer is not None:
        write_tokenizer(folder, tokenizer)


def _copy(path: Path, base: Path, folder: Path) -> None:
    """Copies a file of the directory `base` to its place in an export, see `inside`."""
    name = path.relative_to(base)
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(inside(base, str(name)), folder / name)


def write_generation_config(
    folder: Path, base: Path | None, values: dict[str, Any], stop: Sequence[int]
) -> None:
    """Writes generation_config.json: a byte-for-byte copy of `base`'s if it names every id of
    `stop`, else that file with the missing ids. Without one it writes `values` that are not None.
    """
    ids = list(stop)
    if base is not None and (base / GENERATION).is_file():
        values = read_json(base / GENERATION)
        given = values.get("eos_token_id")
        if given is None:
            given = read_json(base / "config.json").get("eos_token_id")
        given = given if isinstance(given, list) else [] if given is None else [given]
        if set(ids) <= set(given):
            _copy(base / GENERATION, base, folder)
            return
        ids = [*given, *(token for token in ids if token not in given)]
    values = values | {"eos_token_id": ids if len(ids) > 1 else ids[0] if ids else None}
    write_json(folder / GENERATION, {k: v for k, v in values.items() if v is not None})


def tokenizer_state(tokenizer: Any) -> dict[str, Any] | None:
    """The behaviour and settings of a tokenizer, comparable by value; None for no tokenizer."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    names = ("chat_template", "padding_side", "truncation_side", "model_max_length")
    tokens = tokenizer.added_tokens_decoder.items()
    return {
        "class": type(tokenizer).__name__,
        "backend": None if backend is None else json.loads(_plain(backend).to_str()),
        "vocabulary": len(tokenizer),
        "added": {i: {name: getattr(token, name) for name in _ADDED} for i, token in tokens},
        "special": {name: getattr(tokenizer, f"{name}_token") for name in _NAMED},
        "more": sorted(tokenizer.all_special_tokens),
        **{name: getattr(tokenizer, name) for name in names},
    }


def _plain(backend: Any) -> Any:
    """The backend without padding and truncation, which stay switched on after a call."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(backend.to_str())
    plain.no_padding()
    plain.no_truncation()
    return plain


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes a tokenizer's files, of a class that transformers 4 and 5 know."""
    tokenizer.save_pretrained(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    _plain(backend).save(str(folder / "tokenizer.json"))
    config = read_json(folder / "tokenizer_config.json")
    if isinstance(config.get("extra_special_tokens"), list):  # version 4 has a table there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers writes these as they were loaded.
    names = ("padding_side", "truncation_side", "model_max_length")
    config |= {name: getattr(tokenizer, name) for name in names}
    # Version 4 would add token_type_ids, which a Llama does not accept.
    config["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", config)
