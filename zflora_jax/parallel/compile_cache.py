"""JAX's persistent compilation cache, in a directory of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from zflora_jax.core.storage import as_path, local_folder

KEPT_FROM_SECONDS = 0.2  # programs that compile faster are not cached


@contextmanager
def compile_cache(directory: str | Path) -> Iterator[None]:
    """Keeps compiled programs in a directory, and reuses those that are there.

    A cache that is already in use stays in use. JAX_COMPILATION_CACHE_DIR names another directory,
    JAX_ENABLE_COMPILATION_CACHE=false switches it off. Entries are machine code that JAX runs, so
    switch it off for directories that you do not trust. An entry that cannot be read or written
    causes a warning and is compiled again.

    Args:
      directory: Directory of the cache. For a URL, programs are kept in the local cache instead.
    """
    config: Any = jax.config  # its values have no types
    if config.jax_compilation_cache_dir is not None:
        yield
        return
    least = config.jax_persistent_cache_min_compile_time_secs
    settings = {
        "jax_compilation_cache_dir": str(local_folder(as_path(directory))),
        "jax_persistent_cache_min_compile_time_secs": min(least, KEPT_FROM_SECONDS),
    }
    with _configured(settings):
        yield


def no_compile_cache() -> AbstractContextManager[None]:
    """Compiles without any cache: a program for an absent device cannot be read from one."""
    return _configured({"jax_enable_compilation_cache": False})


@contextmanager
def _configured(settings: dict[str, Any]) -> Iterator[None]:
    """Context with settings of jax, which otherwise keeps the cache of its first program."""
    before = {name: getattr(jax.config, name) for name in settings}
    _set(settings)
    try:
        yield
    finally:
        _set(before)


def _set(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # type: ignore[no-untyped-call]
