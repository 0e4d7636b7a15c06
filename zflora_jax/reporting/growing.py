"""Files that lines are added to while a program runs, on disk and in buckets.

Nothing can be appended to an object. What grows is kept here, and uploaded whole from time to time
(`sync`); what was not uploaded when the process was killed is lost.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from zflora_jax.core.storage import as_path, is_store_error, is_url, put, put_file
from zflora_jax.reporting.files import atomic_write

log = logging.getLogger(__name__)

UPLOAD_EVERY = 30.0  # seconds


@contextmanager
def uploading(what: str) -> Iterator[None]:
    """Turn what a store raises into an OSError that names `what`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_store_error(error):
            raise
        raise OSError(f"{what} could not be uploaded: {error}") from error


@contextmanager
def warning() -> Iterator[None]:
    """Make a failed upload a warning: a later one brings the same lines."""
    try:
        yield
    except OSError as error:
        log.warning("%s", error)


class GrowingFile:
    """A text file that is begun anew and then added to.

    On disk, each addition is in the file when `add` returns. In a bucket, additions are there after
    `sync`.

    Args:
      path: of the file, or URL of an object.
      text: how it begins.
    """

    def __init__(self, path: Path, text: str = "") -> None:
        self._path = path
        self._file: TextIO | None = None
        self._lines, self._new, self._synced = [text], False, time.monotonic()
        atomic_write(path, text.encode())
        if not is_url(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, text: str) -> None:
        """Add `text` at the end."""
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
        else:
            self._lines.append(text)
            self._new = True

    def is_due(self) -> bool:
        """Whether the last upload was UPLOAD_EVERY seconds ago and something was added since."""
        return self._new and time.monotonic() - self._synced >= UPLOAD_EVERY

    def sync(self) -> None:
        """Upload what has been added."""
        if self._new:
            self._synced = time.monotonic()
            put(self._path, "".join(self._lines).encode())
            self._new = False

    def close(self) -> None:
        """Close the file. It does not upload."""
        if self._file is not None:
            self._file.close()


class GrowingFolder:
    """A folder of files that grow, for libraries that write local files only.

    On disk it is the folder itself. For a bucket it is a temporary one, whose files are uploaded
    under the URL by `sync`.

    Args:
      path: the folder, or its URL.
      names: objects at the URL to begin with, where they exist.
    """

    def __init__(self, path: str | Path, names: Sequence[str] = ()) -> None:
        self._target = as_path(path)
        self.path = self._target
        self._uploaded: dict[Path, tuple[int, int]] = {}  # file -> its size and time when it was
        if is_url(self._target):
            self._temporary = Path(tempfile.mkdtemp(prefix="zflora-"))
            self.path = self._temporary / self._target.name
            self.path.mkdir()
            for name in names:
                if (self._target / name).exists():
                    (self.path / name).write_bytes((self._target / name).read_bytes())

    def sync(self) -> None:
        """Upload the files that have changed."""
        if self.path == self._target:
            return
        for file in sorted(self.path.rglob("*")):
            if file.is_symlink() or not file.is_file():
                continue
            now = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._uploaded.get(file) != now:
                to = self._target / file.relative_to(self.path).as_posix()
                put_file(file, to)
                self._uploaded[file] = now

    def close(self) -> None:
        """Remove what is temporary. It does not upload."""
        if self.path != self._target:
            shutil.rmtree(self._temporary, ignore_errors=True)
