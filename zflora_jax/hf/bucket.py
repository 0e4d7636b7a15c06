"""Model directories in a bucket: uploaded under a manifest, downloaded into a cache.

The manifest .zflora-upload.json lists the files with their sizes. It is written first with
"complete": false, and last with true, so an upload that was killed is never taken for a whole
export. A directory without it was copied there by other software.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.storage import cache_dir, file_system, objects, put, put_file, remove, scratch

MARKER = ".zflora-upload.json"
KEPT = 24 * 3600.0  # seconds that an older copy stays, which another process may be reading
MAX_HEADER = 100_000_008  # bytes; the most that safetensors reads
# The files that loading a model reads.
MODEL_FILES = (
    *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "zflora/*"),
    "additional_chat_templates/*.jinja",
)
# Other formats of the same weights (Meta's, Mistral's).
OTHER_FILES = ("original/*", "consolidated*.safetensors")


def listed(target: Path) -> set[str]:
    """The files of an export at a URL by its manifest, whole or not; empty without an export."""
    return set(_manifest(target).get("files", ()))


def upload(folder: Path, target: Path) -> None:
    """Uploads a directory in place of an earlier export.

    Args:
      folder: The local directory.
      target: The URL; all objects there are replaced.
    """
    files = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    old = dict.fromkeys(set(objects(target)) - {MARKER, *files})  # listed until they are gone
    _put_manifest(target, {"complete": False, "files": files | old})
    for name in old:
        remove(target / name)
    for name in files:
        put_file(folder / name, target / name)
    _put_manifest(target, {"complete": True, "files": files})


def download(source: Path, *, weights: bool = True) -> Path:
    """Copies a model into the cache, unless it is there already. An older copy of it is removed.

    Args:
      source: URL of a directory, or of one file.
      weights: Whether to copy the tensors of a directory; else .safetensors files have their
        header, and zeros that take no room.

    Returns:
      The local directory or file.

    Raises:
      CheckpointError: There is nothing at the URL, an upload was not finished, or a file has
        another size than in the manifest.
    """
    root, files = _find(source)
    prefix = f"{source.name}-{_digest(os.fspath(source))}{'' if weights else '-no-weights'}-"
    copy = cache_dir() / "models" / (prefix + _digest(json.dumps(files, sort_keys=True)))
    if not copy.exists():
        with scratch() as temporary:
            for name, (size, _) in files.items():
                to = temporary / "copy" / name
                to.parent.mkdir(parents=True, exist_ok=True)
                header_only = not weights and name.endswith(".safetensors")
                _fetch(root / name, to, size, header_only)
            copy.parent.mkdir(exist_ok=True)
            try:
                os.rename(temporary / "copy", copy)
            except OSError:
                if not copy.is_dir():  # else another process was faster
                    raise
        for old in copy.parent.glob(f"{prefix}*"):
            if old != copy and time.time() - old.stat().st_mtime > KEPT:
                shutil.rmtree(old, ignore_errors=True)
    return copy if root == source else copy / source.name


def _find(source: Path) -> tuple[Path, dict[str, tuple[int, str]]]:
    """The files of a model: the URL they are under, and name -> size and a tag of the content."""
    from huggingface_hub.utils import filter_repo_objects

    def tagged(facts: dict[str, Any]) -> tuple[int, str]:
        return facts["size"], str(facts.get("ETag") or facts.get("etag") or facts.get("mtime"))

    there = objects(source)
    if not there and source.exists():
        facts = file_system(source).info(os.fspath(source))
        return source.parent, {source.name: tagged(facts)}
    names = set(there) - {MARKER}
    found = filter_repo_objects(
        names, allow_patterns=list(MODEL_FILES), ignore_patterns=list(OTHER_FILES)
    )
    files = {name: tagged(there[name]) for name in found}
    if not files:
        raise CheckpointError(f"no model at {source}: there are no objects of a model.")
    manifest = _manifest(source)
    if manifest and not manifest.get("complete"):
        raise CheckpointError(
            f"{source} is not whole: its upload goes on, or was stopped. Export it again."
        )
    for name, size in manifest.get("files", {}).items():
        if name in files and files[name][0] != size:
            raise CheckpointError(
                f"{source / name} is damaged: it has {files[name][0]} bytes, {size} were uploaded."
                " Export it again."
            )
    return source, files


def _fetch(source: Path, to: Path, size: int, header_only: bool) -> None:
    """Copies a file; `header_only`, a safetensors file whose tensors are a hole."""
    store, url = file_system(source), os.fspath(source)
    if header_only:
        length = 8 + int.from_bytes(store.cat_file(url, start=0, end=8), "little")
        to.write_bytes(store.cat_file(url, start=0, end=min(length, size, MAX_HEADER)))
        os.truncate(to, size)
        return
    store.get_file(url, os.fspath(to))
    if (found := to.stat().st_size) != size:
        raise CheckpointError(
            f"{source} changed while it was read: {found} bytes found, {size} expected. Try again."
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _manifest(target: Path) -> dict[str, Any]:
    """The content of the manifest; empty without one."""
    try:
        found = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _put_manifest(target: Path, content: dict[str, Any]) -> None:
    put(target / MARKER, json.dumps(content, indent=1).encode())
