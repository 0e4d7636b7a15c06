"""Paths in buckets: etils.epath's, changed where objects differ from files."""

from __future__ import annotations

import os
from typing import Any

import fsspec
from etils.epath.gpath import PosixGPath


class BucketPath(PosixGPath):  # type: ignore[misc]
    """A URL with the methods of pathlib.Path.

    An object is read by one request. epath asks for its size first, and fails if the object is
    replaced in between.
    """

    def read_bytes(self) -> bytes:
        url = os.fspath(self)
        content: bytes = fsspec.filesystem(url.partition("://")[0]).cat_file(url)
        return content

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Does nothing: a bucket has no directories."""

    def resolve(self, strict: bool = False) -> Any:
        return self  # epath would prepend the current directory

    def absolute(self) -> Any:
        return self

    def expanduser(self) -> Any:
        return self
