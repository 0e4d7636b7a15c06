"""Directories that appear whole or not at all, and replace only what this project wrote."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from zflora_jax.core.errors import CheckpointError


@contextlib.contextmanager
def whole_directory(target: Path, own_files: Callable[[Path], set[str] | None]) -> Iterator[Path]:
    """Write a directory in one step.

    The block writes into a temporary directory beside `target`. If it succeeds, that directory is
    flushed to disk and renamed to `target`; if not, it is removed. During a replacement the old
    directory lies whole beside the new one.

    Args:
      target: the directory to make. An existing one is replaced only if `own_files` lists every
        file.
      own_files: directory -> the files that this project wrote there; None: it is not this
        project's.

    Yields:
      The temporary directory.

    Raises:
      CheckpointError: `target` must not be replaced; nothing is written then.
    """
    _refuse_foreign(target, own_files)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield staging
        mask = _umask()
        for entry in [
            *staging.rglob("*"),
            staging,
        ]:  # mkdtemp and safetensors leave them readable by the owner alone
            os.chmod(entry, (0o777 if entry.is_dir() else 0o666) & ~mask)
            _fsync(entry)
        _refuse_foreign(target, own_files)
        _rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _refuse_foreign(target: Path, own_files: Callable[[Path], set[str] | None]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a directory to write to.")
    present = {
        str(p.relative_to(target)) for p in target.rglob("*") if p.is_symlink() or not p.is_dir()
    }
    if not present:
        return
    advice = "It is left as it is: choose another path, or move it away."
    ours = own_files(target)
    if ours is None:
        raise CheckpointError(f"{target} exists and was not written by this project. {advice}")
    if foreign := sorted(present - ours):
        raise CheckpointError(
            f"{target} holds files that this project did not write there: {', '.join(foreign[:8])}."
            f" {advice}"
        )


def _rename(staging: Path, target: Path) -> None:
    if target.exists():
        old = staging.with_suffix(".old")
        os.rename(target, old)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old)
    else:
        os.rename(staging, target)
    _fsync(target.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
