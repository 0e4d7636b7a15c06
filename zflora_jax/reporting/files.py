"""Files and objects that are written whole or not at all, including JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from zflora_jax.core.fields import require
from zflora_jax.core.storage import as_path, is_url, whole_file


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """The Path of a local file or directory; ConfigError that calls it `name` if it is empty or a
    URL, which as a Path would become a directory called "gs:".
    """
    require(
        not is_url(path),
        f"{name} {os.fspath(path)} is a URL: this is not written to object storage. Give a path"
        " of a file system that is mounted here, and copy the result afterwards.",
    )
    return as_path(path, name)


def plain(value: Any) -> Any:
    """Converts a value to JSON's types: scalars of numpy and jax to numbers, tuples to lists, paths
    to text, non-finite numbers to null; also inside dicts and lists.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and jax: scalars and small arrays
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Writes `values` (see `plain`) as indented JSON, whole or not at all."""
    text = json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(path, f"{text}\n".encode())


def write_result(out: str | os.PathLike[str], values: Mapping[str, Any], page: str) -> None:
    """Writes <out>.json with `values` (see `plain`), then <out>.md with `page`. A dot in `out`
    ("llama-3.2-1b") does not begin a suffix.
    """
    write_json(f"{os.fspath(out)}.json", values)
    atomic_write(f"{os.fspath(out)}.md", page.encode())


def atomic_write(path: str | Path, data: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one.

    Args:
      path: Path of the file, whose directory is made if missing; or URL of an object.
      data: The new content.
    """
    with whole_file(as_path(path)) as file:
        file.write_bytes(data)
