"""Places of runs and exports: local paths, and URLs of object storage (s3://, gs://).

`as_path` turns both into objects with pathlib's methods. The rest of this module hides what buckets
lack: nothing can be appended to an object or renamed, so files are written locally and uploaded
whole.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from zflora_jax.core.fields import ConfigError, first_line, require

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}  # scheme -> the package that speaks it
_URL = re.compile(r"([A-Za-z][\w+.-]+):/+(.*)", re.DOTALL)  # s3:/b/x: of a Path
# The settings that give access to a store.
_ACCESS = {
    "s3": "AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
    " AWS_PROFILE, or the machine's role)",
    "gs": "STORAGE_EMULATOR_HOST and the credentials (GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth"
    " application-default login`, or the machine's service account)",
}
# A cached listing would hide what other processes write. Without a limit on attempts, an
# unreachable store blocks for many minutes.
_SETTINGS: dict[str, dict[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"max_attempts": 4, "mode": "standard"},
        },
    },
    "gs": {"use_listings_cache": False},
}
_UPLOAD = {"gs": {"consistency": "md5"}}  # options of an upload: the store verifies the bytes
# Their exceptions are not all OSErrors.
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google")


# --- paths ----------------------------------------------------------------------------------------


def is_url(path: str | os.PathLike[str]) -> bool:
    """True if `path` is a URL, of object storage or of something else."""
    return _URL.match(os.fspath(path)) is not None


def as_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """A pathlib.Path, or for a URL a `bucket_path.BucketPath`, which has the same methods.

    Args:
      path: "runs/a", "s3://bucket/run", "gs://bucket/run", or a result of this function.
      name: Name of the path in messages, such as "workdir".

    Raises:
      ConfigError: The path is empty, its scheme is unknown or its package is not installed; or the
        bucket, at its first use, cannot be listed.
    """
    require(os.fspath(path) != "", f"{name} is empty: give a path; . is the working directory.")
    match = _URL.match(os.fspath(path))
    if match is None:
        return Path(path)
    scheme, rest = match[1], match[2].rstrip("/")
    url = f"{scheme}://{rest}"
    require(
        scheme in PACKAGES,
        f"{name} {url} is a URL of {scheme}: a directory, s3://bucket/... and gs://bucket/..."
        " can be used.",
    )
    bucket, _, key = rest.partition("/")
    require(
        bool(bucket and key),
        f"{name} {url}: expected {scheme}://BUCKET/FOLDER, a folder in a bucket.",
    )
    _connect(scheme, bucket, key)
    from zflora_jax.core.bucket_path import BucketPath  # importing etils is slow

    return cast(Path, BucketPath(url))


def output_path(path: str | os.PathLike[str], name: str, folder: bool = False) -> Path:
    """`as_path` of an output file (with `folder`, of a folder of files). Raises ConfigError before
    any work is done if a local one cannot be written.
    """
    out = as_path(path, name)
    if not is_url(out):
        named = folder or not out.is_dir()
        require(named, f"{name} {out} is a directory; give the name of a file.")
        above = next(p for p in [out, *out.parents][not folder :] if p.exists())
        may = above.is_dir() and os.access(above, os.W_OK)
        require(may, f"{name} {out}: {above} is no directory that you may write to.")
    return out


@functools.cache
def _check_installed(scheme: str) -> None:
    """Refuses a scheme whose package is missing; sets the defaults of its file system."""
    package = PACKAGES[scheme]
    require(
        importlib.util.find_spec(package) is not None,
        f"{scheme}:// needs the package {package}: pip install {package}.",
    )
    os.environ.setdefault("EPATH_USE_TF", "false")  # else epath prefers an installed tensorflow
    from fsspec.config import conf

    conf[scheme] = _SETTINGS[scheme] | conf.get(scheme, {})  # the user's settings for fsspec stay


_reached: set[tuple[str, str]] = set()  # (scheme, bucket)


def _connect(scheme: str, bucket: str, key: str) -> None:
    """Checks that a bucket can be listed, once per process."""
    _check_installed(scheme)
    if (scheme, bucket) in _reached:
        return
    try:
        file_system(f"{scheme}://{bucket}").find(f"{bucket}/{key}/.zflora")
    except Exception as error:  # each library has its own
        fix = f"Check the network, and {_ACCESS[scheme]}: you need to list, read, write and delete"
        if isinstance(error, FileNotFoundError):
            fix = "Make this bucket, or correct the URL"
        raise ConfigError(
            f"cannot use {scheme}://{bucket} ({type(error).__name__}: {first_line(error)}). {fix}."
        ) from error
    _reached.add((scheme, bucket))


def is_store_error(error: BaseException) -> bool:
    """True if a library of object storage raised `error`."""
    return any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(error).__mro__)


# --- objects of a bucket --------------------------------------------------------------------------


def file_system(path: str | os.PathLike[str]) -> Any:
    """fsspec's file system of a URL."""
    import fsspec

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


def _options(path: Path) -> dict[str, str]:
    return _UPLOAD.get(os.fspath(path).partition("://")[0], {})


def create(path: Path, data: bytes) -> bool:
    """Writes an object unless there is one; returns whether this call wrote it."""
    try:
        file_system(path).pipe_file(os.fspath(path), data, mode="create", **_options(path))
    except FileExistsError:
        return False
    return True


def put(path: Path, data: bytes) -> None:
    """Writes an object; a reader sees the old content or the new one."""
    file_system(path).pipe_file(os.fspath(path), data, **_options(path))


def put_file(file: Path, path: Path) -> None:
    """Uploads a local file as one object."""
    file_system(path).put_file(os.fspath(file), os.fspath(path), **_options(path))


def objects(path: Path) -> dict[str, dict[str, Any]]:
    """The objects under a URL: name relative to it -> size, ETag and time as the store has them."""
    store, url = file_system(path), os.fspath(path)
    root = store._strip_protocol(url) + "/"
    found = store.find(url, detail=True)
    return {name.removeprefix(root): facts for name, facts in found.items() if name != root[:-1]}


def remove(path: Path) -> None:
    """Deletes a file or a directory, or all objects under a URL and at it, if there are any."""
    if is_url(path):
        store = file_system(path)
        if names := store.find(os.fspath(path)):
            store.rm(names)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- files that are whole or absent ---------------------------------------------------------------


def cache_dir() -> Path:
    """The local cache: $ZFLORA_CACHE, or ~/.cache/zflora_jax."""
    return Path(os.environ.get("ZFLORA_CACHE") or "~/.cache/zflora_jax").expanduser()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary directory in the local cache; /tmp may be smaller than a model."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=cache_dir()) as folder:
        yield Path(folder)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a local path to write to. When the block succeeds, that file takes the place of
    `path`, whose directory is made if missing, or is uploaded to it: a reader, or a crash, sees the
    old content or the new one.
    """
    if is_url(path):
        with scratch() as folder:
            yield folder / path.name
            put_file(folder / path.name, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def local_copy(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """A local directory itself, or a temporary copy of the objects `names` under a URL."""
    if not is_url(folder):
        yield folder
        return
    with scratch() as copy:
        files = [(folder / name, copy / name) for name in names]
        for _, to in files:
            to.parent.mkdir(parents=True, exist_ok=True)
        # By their names: a listing may lack some.
        file_system(folder).get(*(list(map(os.fspath, each)) for each in zip(*files, strict=True)))
        yield copy


def local_folder(path: Path) -> Path:
    """A local directory for files that may be lost: `path`, or for a URL one in the local cache."""
    return cache_dir() / path.name if is_url(path) else path.absolute()


class Mirror:
    """A local folder at `path` for programs that append to files; `sync` uploads its files. If the
    target is no URL, it is the target itself.

    Args:
      target: The folder, or its URL.
      names: Files that are first copied from the URL, if they exist.
    """

    def __init__(self, target: Path, names: Sequence[str] = ()) -> None:
        self._target = self.path = target
        self._uploaded: dict[Path, tuple[int, int]] = {}  # file -> its size and time
        self._temporary = contextlib.ExitStack()
        if not is_url(target):
            target.mkdir(parents=True, exist_ok=True)
            return
        self.path = self._temporary.enter_context(scratch()) / target.name
        self.path.mkdir()
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).write_bytes((target / name).read_bytes())

    def sync(self) -> None:
        """Uploads the files that have changed; OSError if an upload fails."""
        if self.path is self._target:
            return
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            now = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._uploaded.get(file) != now:
                to = self._target / file.relative_to(self.path).as_posix()
                try:
                    put_file(file, to)
                except Exception as error:  # stores raise many types
                    raise OSError(f"{to} could not be uploaded: {error}") from error
                self._uploaded[file] = now

    def close(self) -> None:
        """Removes temporary files. It does not upload."""
        self._temporary.close()
