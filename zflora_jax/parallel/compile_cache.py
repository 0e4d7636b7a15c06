"""JAX's persistent compilation cache, in a directory of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from zflora_jax.core.storage import as_path, local_folder

KEPT_FROM_SECONDS = 0.2  # programs that compile faster are not cached


@contextmanager
def compile_cache(directory: str | Path) -> Iterator[None]:
    """Keeps compiled programs in a directory, and reuses those that are there.

    A cache that is in use already stays in use. JAX_COMPILATION_CACHE_DIR names another directory,
    JAX_ENABLE_COMPILATION_CACHE=false switches it off. Entries are machine code that JAX runs:
    switch it off for a directory of a stranger. An entry that cannot be read or written causes a
    warning and is compiled again.

    Args:
      directory: Directory of the cache. For a URL, programs are kept in the local cache instead.
    """
    config: Any = jax.config  # its values have no types
    if config.jax_compilation_cache_dir is not None:
        yield
        return
    least = config.jax_persistent_cache_min_compile_time_secs
    _use(str(local_folder(as_path(directory))), min(least, KEPT_FROM_SECONDS))
    try:
        yield
    finally:
        _use(None, least)


@contextmanager
def no_compile_cache() -> Iterator[None]:
    """Compile without any cache: a program for an absent device cannot be read from one."""
    was = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    _enable(False)
    try:
        yield
    finally:
        _enable(was)


def _enable(cached: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", cached)
    # jax else keeps to what it found at its first program.
    compilation_cache.reset_cache()  # type: ignore[no-untyped-call]


def _use(directory: str | None, least: float) -> None:
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()  # type: ignore[no-untyped-call]  # else the first directory of a process is used for good
