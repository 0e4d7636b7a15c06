"""Where runs and exports may lie: local paths, and URLs of object storage (s3://, gs://).

`as_path` turns both into objects with the methods of pathlib, so most code does not see which one
it has. Buckets have no append, no rename and no lock: a single object is replaced at once by a put,
and whatever consists of several counts only when its last object is there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import Any, cast

from zflora_jax.core.fields import ConfigError, first_line, require

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}  # scheme -> the package that speaks it
_URL = re.compile(r"([A-Za-z][\w+.-]+):/+(.*)", re.DOTALL)  # s3:/b/x: of a Path
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the"
    " machine's service account",
}
_ENDPOINT = {"s3": "AWS_ENDPOINT_URL", "gs": "STORAGE_EMULATOR_HOST"}
# A listing that is kept would hide what other processes write. Without a limit of attempts, a store
# that cannot be reached is waited for many minutes.
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
# What their libraries raise beside OSError.
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL, of object storage or of something else."""
    return _URL.match(os.fspath(path)) is not None


def as_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Turn a local path or a URL of object storage into an object with pathlib's methods.

    The first use of a bucket checks that it can be listed.

    Args:
      path: "runs/a", "s3://bucket/run", "gs://bucket/run", or what this function has returned.
      name: of the path in messages, such as "workdir".

    Returns:
      A pathlib.Path, or for a URL a `bucket_path.BucketPath`, which has the same methods.

    Raises:
      ConfigError: a URL of something else, its package is not installed, or its bucket cannot be
        used: it does not exist, credentials are missing or not allowed to list it, or its endpoint
        cannot be reached.
    """
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
    from zflora_jax.core.bucket_path import BucketPath  # etils takes a while

    return cast(Path, BucketPath(url))


@functools.cache
def _check_installed(scheme: str) -> None:
    """Refuse a scheme whose package is missing; set how stores are spoken to."""
    package = PACKAGES[scheme]
    require(
        importlib.util.find_spec(package) is not None,
        f"{scheme}:// needs the package {package}: pip install 'zflora-jax[storage]'.",
    )
    os.environ.setdefault("EPATH_USE_TF", "false")  # else epath prefers tensorflow where it is
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):  # under tensorstore's name for it
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    from fsspec.config import conf

    given = conf.setdefault(scheme, {})  # what the user has set for fsspec stays
    for key, value in _SETTINGS[scheme].items():
        given.setdefault(key, value)


_reached: set[tuple[str, str]] = set()  # (scheme, bucket)


def _connect(scheme: str, bucket: str, key: str) -> None:
    """Check that a bucket can be listed, once per process."""
    _check_installed(scheme)
    if (scheme, bucket) in _reached:
        return
    try:
        file_system(f"{scheme}://{bucket}").find(f"{bucket}/{key}/.zflora")
    except Exception as error:  # each library has its own
        raise ConfigError(_unusable(scheme, bucket, error)) from error
    _reached.add((scheme, bucket))


def _unusable(scheme: str, bucket: str, error: Exception) -> str:
    """Why a bucket cannot be used, and what to do."""
    kind, text = type(error).__name__, first_line(error).rstrip(".")
    if isinstance(error, FileNotFoundError):
        why = f"there is no such bucket ({text}). Make it, or correct the URL"
    elif "Credential" in kind or "Token" in kind:
        why = f"no credentials were found ({text}). Set {_CREDENTIALS[scheme]}"
    elif isinstance(error, PermissionError):
        why = (
            f"access is denied ({text}). The credentials must be allowed to list, read, write and"
            f" delete its objects; they come from {_CREDENTIALS[scheme]}"
        )
    else:
        why = (
            f"it cannot be reached ({kind}: {text}). Check the network, and"
            f" {_ENDPOINT[scheme]}, which names a store other than the provider's"
        )
    return f"cannot use {scheme}://{bucket}: {why}."


def is_store_error(error: BaseException) -> bool:
    """Whether a library of object storage raised `error`: the store, the network or the
    credentials failed.
    """
    return any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(error).__mro__)


def file_system(path: str | os.PathLike[str]) -> Any:
    """fsspec's file system of a URL."""
    import fsspec

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


def put(path: Path, data: bytes) -> None:
    """Write one object of a bucket; a reader sees the old content or the new one."""
    file_system(path).pipe_file(os.fspath(path), data)


def put_file(file: Path, path: Path) -> None:
    """Upload a local file as one object."""
    file_system(path).put_file(os.fspath(file), os.fspath(path))


def objects(path: Path) -> dict[str, dict[str, Any]]:
    """The objects under a URL: name relative to it -> what the store says of each."""
    store, url = file_system(path), os.fspath(path)
    root = store._strip_protocol(url) + "/"
    found = store.find(url, detail=True)
    return {name.removeprefix(root): facts for name, facts in found.items() if name != root[:-1]}


def remove(path: Path) -> None:
    """Delete all objects under a URL, and the one at it, if there are any."""
    store = file_system(path)
    names = store.find(os.fspath(path))
    if names:
        store.rm(names)


def modified(path: Path) -> float:
    """When an object was written, in seconds of the store's clock.

    Raises:
      FileNotFoundError: there is no such object.
    """
    when: float = file_system(path).modified(os.fspath(path)).timestamp()
    return when
