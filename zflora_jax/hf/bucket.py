"""Model directories in a bucket: uploaded under a marker, downloaded into a cache.

The marker .zflora-upload.json lists the files with their sizes and SHA-256. It is written first,
saying "complete": false, and last, saying true: an upload that was killed is never taken for a
whole export. A directory without a marker was copied there by other software, and is checked by
sizes alone.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.storage import file_system, is_store_error, objects, put, put_file, remove

MARKER = ".zflora-upload.json"


def cache_dir() -> Path:
    """Where copies of models lie: models/ in $ZFLORA_CACHE, or in ~/.cache/zflora_jax."""
    return Path(os.environ.get("ZFLORA_CACHE") or "~/.cache/zflora_jax").expanduser() / "models"


def refuse_foreign_objects(target: Path) -> None:
    """Check that an export may replace what is at a URL.

    Raises:
      CheckpointError: there are objects that no export of this project wrote.
    """
    there = set(objects(target)) - {MARKER}
    if foreign := sorted(there - set(_marker(target).get("files", ()))):
        raise CheckpointError(
            f"{target} holds objects that this project did not write there:"
            f" {', '.join(foreign[:8])}. They are left as they are: choose another path, or move"
            " them away."
        )


def upload(folder: Path, target: Path) -> None:
    """Upload a directory in place of an earlier export.

    Args:
      folder: whose files are uploaded.
      target: the URL.
    """
    refuse_foreign_objects(target)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: _facts(folder / name) for name in names}
    old = dict.fromkeys(set(objects(target)) - {MARKER, *files})  # listed until they are gone
    _put_marker(target, {"complete": False, "files": files | old})
    for name in old:
        remove(target / name)
    for name in names:
        put_file(folder / name, target / name)
    _put_marker(target, {"complete": True, "files": files})


def download(source: Path, patterns: Sequence[str]) -> Path:
    """Copy a model into the cache, unless it is there already.

    Args:
      source: URL of a directory, or of one file.
      patterns: of the names that are needed from a directory.

    Returns:
      The local directory or file.

    Raises:
      CheckpointError: there is nothing, an upload was not finished, or a file is not what the
        marker says.
    """
    try:
        return _download(source, patterns)
    except Exception as error:
        if not is_store_error(error):
            raise
        raise CheckpointError(f"{source} could not be downloaded: {error}.") from error


def _download(source: Path, patterns: Sequence[str]) -> Path:
    store = file_system(source)
    single = not (there := objects(source)) and source.exists()
    if single:
        there = {source.name: store.info(os.fspath(source))}
    wanted = {
        name: facts
        for name, facts in there.items()
        if single or (name != MARKER and any(fnmatch.fnmatch(name, p) for p in patterns))
    }
    if not wanted:
        raise CheckpointError(f"no model at {source}: there are no objects of a model.")
    marker = {} if single else _marker(source)
    if marker and not marker.get("complete"):
        raise CheckpointError(
            f"{source} is not whole: its upload goes on, or was stopped. Export it again."
        )
    version = [
        (name, facts["size"], str(facts.get("ETag") or facts.get("etag") or facts.get("mtime")))
        for name, facts in sorted(wanted.items())
    ]
    key = hashlib.sha256(json.dumps([os.fspath(source), version]).encode()).hexdigest()[:16]
    target = cache_dir() / f"{source.name}-{key}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as temporary:
            copy = Path(temporary) / "copy"
            for name, facts in wanted.items():
                from_ = source if single else source / name
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                store.get_file(os.fspath(from_), os.fspath(copy / name))
                _verify(copy / name, facts["size"], marker.get("files", {}).get(name), from_)
            with contextlib.suppress(FileExistsError):  # another process was faster
                _place(copy, target)
    return target / source.name if single else target


def _place(copy: Path, target: Path) -> None:
    try:
        os.rename(copy, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(copy)


def _verify(file: Path, size: int, marked: dict[str, Any] | None, source: Path) -> None:
    found = _facts(file) if marked else {"bytes": file.stat().st_size}
    expected = marked or {"bytes": size}
    if found != expected:
        raise CheckpointError(
            f"{source} is damaged, or changed while it was read: {found} found, {expected}"
            " expected. Try again, or export it again."
        )


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _marker(target: Path) -> dict[str, Any]:
    """What the marker says; nothing where there is none."""
    try:
        found = json.loads((target / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _put_marker(target: Path, content: dict[str, Any]) -> None:
    put(target / MARKER, json.dumps(content, indent=1).encode())
