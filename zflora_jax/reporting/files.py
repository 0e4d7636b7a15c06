"""Files and objects that are written whole or not at all, JSON among them."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from zflora_jax.core.fields import require
from zflora_jax.core.storage import as_path, is_url, put


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """Turn a path to be written into a Path where object storage cannot be used. Call it before
    anything is created.

    Args:
      path: of a local file or directory.
      name: of the path in the message, such as "workdir".

    Raises:
      ConfigError: it is a URL, which as a Path would become a directory called "gs:".
    """
    require(
        not is_url(path),
        f"{name} {os.fspath(path)} is a URL: this is not written to object storage. Give a"
        " directory of a file system that is mounted here, and copy it afterwards.",
    )
    return Path(path)


def plain(value: Any) -> Any:
    """Turn a value into one that JSON can hold.

    Args:
      value: numpy and jax scalars become numbers, tuples lists, paths text, non-finite numbers
        null; also inside dicts and lists.
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
    """Write indented JSON, whole or not at all.

    Args:
      path: of the file.
      values: its content, see `plain`.
    """
    atomic_write(
        path,
        (json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    )


def write_result(out: str | os.PathLike[str], values: Mapping[str, Any], page: str) -> None:
    """Write <out>.json, then <out>.md: the numbers of a result, and their page.

    Args:
      out: path without a suffix; a dot in its name ("llama-3.2-1b") begins none.
      values: of the JSON, see `plain`.
      page: in Markdown.
    """
    write_json(f"{os.fspath(out)}.json", values)
    atomic_write(f"{os.fspath(out)}.md", page.encode())


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and never a
    mixture.

    Args:
      path: of the file, whose directory is made; or URL of an object.
      data: the new content.
    """
    path = as_path(path)
    if is_url(path):
        put(path, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
