"""Directories that appear whole or not at all, and replace only what this project wrote; on disk,
and in buckets by way of a local copy.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.storage import as_path, is_url, objects, scratch
from zflora_jax.hf.bucket import MARKER, download, listed, upload

log = logging.getLogger(__name__)


def export_target(path: str | os.PathLike[str]) -> Path:
    """The directory, or URL, that an export is written to."""
    return as_path(path, "export directory").expanduser().resolve()


def local_copy(source: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """A local directory or file: `source` itself, or a verified copy of the model at a URL, with
    its tensors if `weights` is set. CheckpointError if nothing, or no whole export, is at the URL.
    """
    path = as_path(source, "model")
    return download(path, weights=weights) if is_url(path) else path.expanduser()


@contextlib.contextmanager
def whole_directory(
    target: Path, own_files: Callable[[Path], set[str] | None], sign: str
) -> Iterator[Path]:
    """Write a directory in one step; yields a temporary directory next to `target` for the files.

    If the block succeeds, that directory is flushed to disk and renamed to `target`; if not, it is
    removed. A directory that is replaced stays whole until then. At a URL, the files are uploaded
    under a marker that says whether they are whole, see `bucket`.

    Args:
      target: The directory to make, or its URL. An existing one is replaced only if `own_files`
        lists every file, else nothing is written and CheckpointError raised.
      own_files: Directory -> the files that this project wrote there, None for a foreign directory.
      sign: Name of a file that marks an export of this type at a URL, in the list of its marker.
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
        mask = _umask()
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
        present, ours = set(objects(target)) - {MARKER}, listed(target)
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
    if target.exists():
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
            shutil.rmtree(old, ignore_errors=True)  # what a signal cut short
    else:
        os.rename(staging, target)
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
    """A temporary directory on the file system of a file that is to be written, removed with the
    context; CheckpointError if that place cannot be written to.
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


def put_in_place(made: Path, target: Path) -> None:
    """Give a file that is finished its final name, on the same file system."""
    fsync(made)
    os.replace(made, target)
    fsync(target.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync(path: Path) -> None:
    """Flush a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
