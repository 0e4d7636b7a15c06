"""Directories of models: written whole or not at all, replacing only files of this project.

In a bucket, an export is uploaded under the manifest .zflora-upload.json, which lists the files
with their sizes. It is written first with "complete": false, and last with true, so a killed upload
never counts as a whole export. Models in a bucket are read through a local copy.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOLD_FULL = re.compile(rf"^\d+ requested and \d+ written|os error ({'|'.join(map(str, _FULL))})\b")
KEPT = 24 * 3600.0  # seconds that an older copy stays: another process may be reading it
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


def local_copy(source: str | os.PathLike[str], files: Sequence[str] = MODEL_FILES) -> Path:
    """A local directory or file: `source`, or a verified copy of the files at a URL that match the
    patterns. CheckpointError if the URL has no such files, or no whole export.
    """
    path = as_path(source, "model")
    return _download(path, files) if is_url(path) else path.expanduser()


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
    refuse_foreign(target, own_files, sign)
    with scratch() if is_url(target) else folder_beside(target) as staging:
        yield staging
        refuse_foreign(target, own_files, sign)
        if is_url(target):
            _upload(staging, target)
            return
        os.umask(mask := os.umask(0))
        # mkdtemp and safetensors make files that only the owner can read.
        for entry in [*staging.rglob("*"), staging]:
            os.chmod(entry, (0o777 if entry.is_dir() else 0o666) & ~mask)
            fsync(entry)
        _rename(staging, target)


def refuse_foreign(target: Path, own_files: Callable[[Path], set[str] | None], sign: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a directory to write to.")
    names: Iterable[str]
    ours: set[str] | None
    if is_url(target):
        there, manifest = objects(target), _manifest(target)
        names, sizes = set(there) - {MARKER}, manifest.get("files", {})
        # A killed upload has old and new sizes, and users do not edit tensors: they are damaged.
        keep = ".safetensors" if manifest.get("complete") else ""
        ours = {x for x in names & {*sizes} if x.endswith(keep) or sizes[x] == there[x]["size"]}
        ours = ours if sign in sizes else None
    else:
        found = (p for p in target.rglob("*") if p.is_symlink() or not p.is_dir())
        names, ours = (str(p.relative_to(target)) for p in found), own_files(target)
    # Below "/" no more files are looked at than the message names.
    foreign = list(itertools.islice((name for name in names if name not in (ours or ())), 8))
    advice = "It is left as it is: choose another path, or move it away."
    if foreign and ours is None:
        raise CheckpointError(f"{target} exists and was not written by this project. {advice}")
    if foreign:
        raise CheckpointError(
            f"{target} holds files that this project did not write there, or that were edited:"
            f" {', '.join(sorted(foreign))}. {advice}"
        )


def _rename(staging: Path, target: Path) -> None:
    replaced, old = target.exists(), staging.with_suffix(".old")
    if replaced:
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except BaseException:
        if replaced:
            os.rename(old, target)
        raise
    try:
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(old, ignore_errors=True)  # where a signal stopped the first
    fsync(target.parent)


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Yields a temporary directory on the file system of an output file or directory. The log names
    those that killed exports left; CheckpointError if the place cannot be written to.
    """
    prefix, names = f".{target.name}.", "[!.]" * 8  # which mkdtemp puts between
    found = target.parent.glob(f"{glob.escape(prefix)}{names}.*")
    if left := sorted(str(path) for path in found if path.suffix in (".tmp", ".old")):
        log.warning(
            "%s: left by an export to this place that was killed, or still runs. If none runs,"
            " delete them; but if %s is missing, rename the one that ends in .old to it.",
            *(", ".join(left), target),
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}. Choose a path that you may"
            " write to."
        ) from error
    try:
        yield Path(folder)
    except Exception as error:
        # Messages of numpy, "96 requested and 64 written", and safetensors, "... (os error 28)".
        if getattr(error, "errno", None) not in _FULL and not _TOLD_FULL.search(str(error)):
            raise
        raise CheckpointError(
            f"{target} could not be written: {error}. Its earlier content, if any, is unchanged."
            " Free space on that disk, or choose another path, and run the same command again."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fsync(path: Path) -> None:
    """Flushes a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- buckets --------------------------------------------------------------------------------------


def _upload(folder: Path, target: Path) -> None:
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


def _download(source: Path, patterns: Sequence[str]) -> Path:
    """Copies files at a URL into the cache, unless they are there; an older copy is removed."""
    root, files = _find(source, patterns)
    prefix = f"{source.name}-{_digest([os.fspath(source), *patterns])}-"
    copy = cache_dir() / "models" / (prefix + _digest(files))
    if not copy.exists():
        with scratch() as temporary:
            for name, (size, _) in files.items():
                _fetch(root / name, temporary / "copy" / name, size)
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


def _find(source: Path, patterns: Sequence[str]) -> tuple[Path, dict[str, tuple[int, str]]]:
    """The files of a model: the URL they are under, and name -> size and a tag of the content.
    CheckpointError if an upload was not finished, or a file has another size than in the manifest.
    """
    from huggingface_hub.utils import filter_repo_objects

    def tagged(facts: dict[str, Any]) -> tuple[int, str]:
        return facts["size"], str(facts.get("ETag") or facts.get("etag") or facts.get("mtime"))

    there = objects(source)
    if not there and source.exists():
        facts = file_system(source).info(os.fspath(source))
        return source.parent, {source.name: tagged(facts)}
    found = filter_repo_objects(
        set(there) - {MARKER}, allow_patterns=[*patterns], ignore_patterns=[*OTHER_FILES]
    )
    files = {name: tagged(there[name]) for name in sorted(found)}
    if not files:
        raise CheckpointError(f"no model at {source}: there are no objects of a model.")
    manifest = _manifest(source)
    if manifest and not manifest.get("complete"):
        raise CheckpointError(
            f"{source} is not whole: its upload still runs, or was stopped. Export it again."
        )
    for name, size in manifest.get("files", {}).items():
        if name in files and files[name][0] != size:
            raise CheckpointError(
                f"{source / name} is damaged: it has {files[name][0]} bytes, {size} were uploaded."
                " Export it again."
            )
    return source, files


def _fetch(source: Path, to: Path, size: int) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    file_system(source).get_file(os.fspath(source), os.fspath(to))
    if (found := to.stat().st_size) != size:
        raise CheckpointError(
            f"{source} changed while it was read: {found} bytes found, {size} expected. Try again."
        )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _manifest(target: Path) -> dict[str, Any]:
    """The content of the manifest; empty without one."""
    try:
        found = json.loads((target / MARKER).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _put_manifest(target: Path, content: dict[str, Any]) -> None:
    put(target / MARKER, json.dumps(content, indent=1).encode())
