"""Directories of models: written whole or not at all, replacing only this project's own files.

In a bucket, an export is uploaded under the manifest .zflora-upload.json, which lists the files
with their sizes. It is written first with "complete": false, and last with true, so a killed upload
is never taken for a whole export. Models there are read through a local copy.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.storage import (
    as_path,
    cache_dir,
    file_system,
    is_url,
    objects,
    put,
    put_file,
    remove,
    scratch,
)

log = logging.getLogger(__name__)

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


def export_target(path: str | os.PathLike[str]) -> Path:
    """The directory, or URL, that an export is written to."""
    return as_path(path, "export directory").expanduser().resolve()


def local_copy(source: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """A local directory or file: `source`, or a verified copy of the model at a URL, with its
    tensors if `weights` is set. CheckpointError if nothing, or no whole export, is at the URL.
    """
    path = as_path(source, "model")
    return download(path, weights=weights) if is_url(path) else path.expanduser()


@contextlib.contextmanager
def whole_directory(
    target: Path, own_files: Callable[[Path], set[str] | None], sign: str
) -> Iterator[Path]:
    """Writes a directory in one step; yields a temporary directory for the files.

    If the block succeeds, that directory is flushed to disk and renamed to `target`; if not, it is
    removed. A directory that is replaced stays whole until then.

    Args:
      target: The directory to make, or its URL. An existing one is replaced only if `own_files`
        lists every file, else CheckpointError is raised and nothing written.
      own_files: Directory -> the files that this project wrote there, None for a foreign directory.
      sign: Name of a file that marks an export of this type at a URL.
    """
    _refuse_foreign(target, own_files, sign)
    if is_url(target):
        with scratch() as folder:
            yield folder
            _refuse_foreign(target, own_files, sign)
            upload(folder, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _folder_beside(target)
    try:
        yield staging
        os.umask(mask := os.umask(0))
        # mkdtemp and safetensors make files that only the owner can read.
        for entry in [*staging.rglob("*"), staging]:
            os.chmod(entry, (0o777 if entry.is_dir() else 0o666) & ~mask)
            fsync(entry)
        _refuse_foreign(target, own_files, sign)
        _rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _refuse_foreign(target: Path, own_files: Callable[[Path], set[str] | None], sign: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a directory to write to.")
    ours: set[str] | None
    if is_url(target):
        present, ours = set(objects(target)) - {MARKER}, set(_manifest(target).get("files", ()))
        ours = ours if sign in ours else None
    else:
        present, ours = _files(target), own_files(target)
    if not present:
        return
    advice = "It is left as it is: choose another path, or move it away."
    if ours is None:
        raise CheckpointError(f"{target} exists and was not written by this project. {advice}")
    if foreign := sorted(present - ours):
        raise CheckpointError(
            f"{target} holds files that this project did not write there: {', '.join(foreign[:8])}."
            f" {advice}"
        )


def _files(directory: Path) -> set[str]:
    found = (p for p in directory.rglob("*") if p.is_symlink() or not p.is_dir())
    return {str(p.relative_to(directory)) for p in found}


def _rename(staging: Path, target: Path) -> None:
    if not target.exists():
        os.rename(staging, target)
    else:
        old = staging.with_suffix(".old")
        os.rename(target, old)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(old, target)
            raise
        try:
            shutil.rmtree(old)
        finally:
            shutil.rmtree(old, ignore_errors=True)  # where a signal stopped the first
    fsync(target.parent)


def _folder_beside(target: Path) -> Path:
    """A new temporary directory next to `target`; warns of those that killed exports left."""
    prefix, names = f".{target.name}.", "[!.]" * 8  # which mkdtemp puts between
    found = target.parent.glob(f"{glob.escape(prefix)}{names}.*")
    left = sorted(path for path in found if path.suffix in (".tmp", ".old"))
    if left:
        earlier = [path for path in left if path.suffix == ".old"]
        log.warning(
            "%s: of an export to this place that was killed, or still runs. If none runs, %s.",
            ", ".join(map(str, left)),
            "delete them"
            if target.exists() or not earlier
            else f"{earlier[-1]} is the export that was there: rename it to {target}",
        )
    return Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=target.parent))


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A temporary directory on the file system of a file that is to be written; CheckpointError if
    that place cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = _folder_beside(target)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}. Choose a path that you may"
            " write to."
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flush a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- buckets --------------------------------------------------------------------------------------


def upload(folder: Path, target: Path) -> None:
    """Uploads a local directory in place of all objects at a URL."""
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
    """Copies a model at a URL into the cache, unless it is there; an older copy is removed.

    weights: Whether to copy tensors; else .safetensors files have their header, and zeros that take
    no room. CheckpointError if there is nothing at the URL, an upload was not finished, or a file
    has another size than in the manifest.
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
