"""TFDS builders. Data is prepared once as ArrayRecord files, which are read at random without
TensorFlow.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError


def cache_dir() -> Path:
    """The directory of prepared data: $ZFLORA_CACHE, or ~/.cache/zflora_jax/tfds."""
    return Path(os.environ.get("ZFLORA_CACHE") or "~/.cache/zflora_jax/tfds").expanduser()


def open_prepared(
    make: Callable[..., Any], split: str, root: str | os.PathLike[str] | None = None
) -> Sequence[Mapping[str, bytes]]:
    """Open the rows of one split, prepared on first use.

    Args:
      make: as for `prepared`, which says what else happens.
      split: of the builder.
      root: directory of prepared data; None: `cache_dir()`.

    Returns:
      Random access to the rows.
    """
    with _quiet():
        return prepared(make, root).as_data_source(split)


def prepared(make: Callable[..., Any], root: str | os.PathLike[str] | None = None) -> Any:
    """A TFDS builder whose data is prepared.

    Two processes may prepare the same data at once: each writes into a directory of its own and
    renames it at the end. The second finds the name taken and reads what the first wrote; the rows
    are the same.

    Args:
      make: a TFDS builder class (or a partial of one), called with `data_dir` and `file_format`.
      root: directory of prepared data; None: `cache_dir()`.

    Raises:
      ConfigError: the directory cannot be written, or the builder refuses its source.
    """
    directory = Path(root).expanduser() if root is not None else cache_dir()
    with _quiet():
        builder = make(data_dir=directory, file_format="array_record")
        if not builder.is_prepared():
            try:
                builder.download_and_prepare()
            except OSError as error:
                builder = make(data_dir=directory, file_format="array_record")
                if not builder.is_prepared():
                    raise ConfigError(
                        f"cannot prepare the dataset {builder.name!r} under {directory}: {error}."
                        " Set the environment variable ZFLORA_CACHE (or data.data_dir of a"
                        " generated task) to a directory that can be written."
                    ) from error
        return builder


# Stdout is the whole process's, and runs of a sweep may load side by side.
_QUIET = threading.RLock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS prints to stdout, draws one bar per split and warns about each custom config; commands
    here print their own results there.
    """
    import tensorflow_datasets as tfds

    with _QUIET:
        absl = logging.getLogger("absl")
        level = absl.level
        absl.setLevel(logging.ERROR)
        tfds.disable_progress_bar()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        finally:
            tfds.enable_progress_bar()
            absl.setLevel(level)
