"""Compiled programs are kept beside a run and found again; what the user set goes before; a damaged
entry is compiled anew.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zflora_jax.parallel.compile_cache import compile_cache, no_compile_cache

pytestmark = pytest.mark.usefixtures("own_programs")
X = np.eye(17, dtype=np.float32)


def program():
    """A function that jax has not compiled yet."""
    return jax.jit(lambda x: jnp.sin(x) @ x + 3.25)


def kept(path) -> int:
    return len(list(path.glob("jit*-cache")))


def test_a_program_is_compiled_once_and_nothing_stays_set(tmp_path, hits):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    found = []
    for name, count in (("a", 0), ("b", 0), ("a", 1)):  # each directory is its own
        with compile_cache(tmp_path / name):
            found.append(program()(X))
        assert kept(tmp_path / name) and len(hits) == count
    np.testing.assert_array_equal(found[0], found[2])
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


def test_the_directory_that_is_in_use_stays(tmp_path):
    with compile_cache(tmp_path / "outer"), compile_cache(tmp_path / "inner"):
        program()(X)
    assert (tmp_path / "outer").is_dir() and not (tmp_path / "inner").exists()


@pytest.mark.filterwarnings("ignore:Error .* persistent compilation cache")
def test_entries_that_cannot_be_read_or_written_stop_nothing(tmp_path):
    """A kill may leave one that is cut short: JAX writes entries in place."""
    with compile_cache(tmp_path):
        want = program()(X)
    for entry in tmp_path.glob("jit*-cache"):
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "cache"):
        with compile_cache(path):
            np.testing.assert_array_equal(program()(X), want)


def test_without_a_cache_nothing_is_written_and_then_it_is_used_again(tmp_path, hits):
    """Also where it was in use before: jax remembers."""
    with compile_cache(tmp_path):
        program()(X)
        first = kept(tmp_path)
        with no_compile_cache():
            jax.jit(lambda x: jnp.cos(x) @ x)(X)
        assert kept(tmp_path) == first and not hits
        program()(X)
    assert len(hits) == 1
