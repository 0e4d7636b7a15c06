"""Model directories in a bucket: uploaded under a marker, downloaded into a cache.

The marker .zflora-upload.json lists the files with their sizes and SHA-256. It is written first,
saying "complete": false, and last, saying true: an upload that was killed is never taken for a
whole export. A directory without a marker was copied there by other software, and is checked by
sizes alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.storage import file_system, is_store_error, objects, put, put_file, remove

MARKER = ".zflora-upload.json"
LOCK = ".lock"  # beside the copy of a model
KEPT = 24 * 3600.0  # seconds that an older copy stays, which another process may be reading
MAX_HEADER = 100_000_008  # bytes; that safetensors reads
# What loading a model reads.
MODEL_FILES = (
    *("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "zflora/*"),
    "additional_chat_templates/*.jinja",
)
# Other forms of the same weights (Meta's, Mistral's).
OTHER_FILES = ("original/*", "consolidated*.safetensors")


def cache_dir() -> Path:
    """Where copies of models lie: models/ in $ZFLORA_CACHE, or in ~/.cache/zflora_jax."""
    return Path(os.environ.get("ZFLORA_CACHE") or "~/.cache/zflora_jax").expanduser() / "models"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary directory beside the copies: what /tmp holds may be smaller than a model."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=cache_dir()) as folder:
        yield Path(folder)


def listed(target: Path) -> set[str]:
    """The files of an export at a URL by its marker, whole or not; none where nothing is."""
    return set(_marker(target).get("files", ()))


def upload(folder: Path, target: Path) -> None:
    """Upload a directory in place of an earlier export.

    Args:
      folder: whose files are uploaded.
      target: the URL; all objects there are replaced.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: _facts(folder / name) for name in names}
    old = dict.fromkeys(set(objects(target)) - {MARKER, *files})  # listed until they are gone
    _put_marker(target, {"complete": False, "files": files | old})
    for name in old:
        remove(target / name)
    for name in names:
        put_file(folder / name, target / name)
    _put_marker(target, {"complete": True, "files": files})


def download(source: Path) -> Path:
    """Copy a model into the cache, unless it is there already. An older copy of it is removed.

    Args:
      source: URL of a directory, or of one file.

    Returns:
      The local directory or file.

    Raises:
      CheckpointError: there is nothing, an upload was not finished, or a file is not what the
        marker says.
    """
    with _failing_as_input(source):
        there = _find(source)
        folder = cache_dir() / f"{source.name}-{_digest(os.fspath(source))}"
        copy = folder / there.version()
        with _alone(folder):
            if not copy.exists():
                with scratch() as temporary:
                    for name in there.files:
                        there.fetch(name, temporary / "copy")
                    _place(temporary / "copy", copy)
                for old in set(folder.iterdir()) - {copy, folder / LOCK}:
                    if time.time() - old.stat().st_mtime > KEPT:  # else it may be being read
                        shutil.rmtree(old, ignore_errors=True)
    return copy if there.root == source else copy / source.name


@contextlib.contextmanager
def headers(source: Path) -> Iterator[Path]:
    """Copy a model without its weights for a while: safetensors files with their headers, and holes
    as large as the tensors behind them.

    Args:
      source: URL of a directory.

    Yields:
      A temporary directory.

    Raises:
      CheckpointError: as `download`.
    """
    with scratch() as folder:
        with _failing_as_input(source):
            there = _find(source)
            for name in there.files:
                if name.endswith(".safetensors"):
                    there.fetch_header(name, folder)
                else:
                    there.fetch(name, folder)
        yield folder


@dataclass(frozen=True)
class _Objects:
    """The files of a model: under the URL `root`, name -> what the store says of each, and what the
    marker does.
    """

    root: Path
    files: dict[str, dict[str, Any]]
    marked: dict[str, dict[str, Any]]

    def version(self) -> str:
        """A name that changes with the files."""
        tags = [
            (name, facts["size"], str(facts.get("ETag") or facts.get("etag") or facts.get("mtime")))
            for name, facts in sorted(self.files.items())
        ]
        return _digest(json.dumps(tags))

    def fetch(self, name: str, folder: Path) -> None:
        """Copy a file under `folder`, and verify it."""
        url, to = self.root / name, folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        file_system(url).get_file(os.fspath(url), os.fspath(to))
        _verify(to, self.files[name]["size"], self.marked.get(name), url)

    def fetch_header(self, name: str, folder: Path) -> None:
        """Write a safetensors file under `folder` whose tensors are a hole."""
        url, to, size = os.fspath(self.root / name), folder / name, self.files[name]["size"]
        store = file_system(url)
        length = 8 + int.from_bytes(store.cat_file(url, start=0, end=8), "little")
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(store.cat_file(url, start=0, end=min(length, size, MAX_HEADER)))
        os.truncate(to, size)


def _find(source: Path) -> _Objects:
    root, there, marker = source, objects(source), {}
    if there:
        files = {name: facts for name, facts in there.items() if _is_of_model(name)}
        marker = _marker(source)
    else:
        root = source.parent
        single = source.exists()
        files = {source.name: file_system(source).info(os.fspath(source))} if single else {}
    if not files:
        raise CheckpointError(f"no model at {source}: there are no objects of a model.")
    if marker and not marker.get("complete"):
        raise CheckpointError(
            f"{source} is not whole: its upload goes on, or was stopped. Export it again."
        )
    return _Objects(root, files, marker.get("files", {}))


def _is_of_model(name: str) -> bool:
    """Whether MODEL_FILES has a file. fnmatch's * takes any /, so their number decides too."""

    def among(patterns: tuple[str, ...]) -> bool:
        return any(
            name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)
            for pattern in patterns
        )

    return name != MARKER and among(MODEL_FILES) and not among(OTHER_FILES)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep the other processes that want a model waiting for the one that downloads it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "wb") as file:
        with contextlib.suppress(OSError):  # on a file system without locks each downloads it
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _place(copy: Path, target: Path) -> None:
    try:
        os.rename(copy, target)
    except OSError:
        if not target.is_dir():  # another process was faster
            raise


@contextlib.contextmanager
def _failing_as_input(source: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_store_error(error):
            raise
        raise CheckpointError(f"{source} could not be downloaded: {error}.") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
