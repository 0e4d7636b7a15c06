"""Compiled programs are kept beside a run and found again; what the user set goes before; a damaged
entry is compiled anew.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zflora_jax.parallel.compile_cache import compile_cache, no_compile_cache

pytestmark = pytest.mark.usefixtures("own_programs")


def program():
    """A function that jax has not compiled yet."""
    return jax.jit(lambda x: jnp.sin(x) @ x + 3.25)


X = np.eye(17, dtype=np.float32)


def test_a_program_is_compiled_once(tmp_path, hits):
    with compile_cache(tmp_path / "kept"):
        first = program()(X)
    assert list((tmp_path / "kept").glob("jit*-cache")) and not hits
    with compile_cache(tmp_path / "kept"):
        second = program()(X)
    assert len(hits) == 1
    np.testing.assert_array_equal(first, second)


def test_each_directory_is_its_own_and_nothing_stays_set(tmp_path, hits):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    for name in ("a", "b"):
        with compile_cache(tmp_path / name):
            program()(X)
    assert len(list((tmp_path / "b").glob("jit*-cache"))) >= 1 and not hits
    assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


def test_the_directory_that_is_in_use_stays(tmp_path, hits):
    with compile_cache(tmp_path / "outer"), compile_cache(tmp_path / "inner"):
        program()(X)
    assert (tmp_path / "outer").is_dir() and not (tmp_path / "inner").exists()


@pytest.mark.filterwarnings("ignore:Error .* persistent compilation cache")
def test_an_entry_cut_short_is_compiled_anew(tmp_path, hits):
    """A kill may leave one: JAX writes entries in place."""
    with compile_cache(tmp_path):
        want = program()(X)
    for entry in tmp_path.glob("jit*-cache"):
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    with compile_cache(tmp_path):
        np.testing.assert_array_equal(program()(X), want)


@pytest.mark.filterwarnings("ignore:Error .* persistent compilation cache")
def test_a_directory_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with compile_cache(tmp_path / "file" / "cache"):
        np.testing.assert_allclose(program()(X)[0, 0], np.sin(1) + 3.25, rtol=1e-6)


def test_without_a_cache_nothing_is_written_and_then_it_is_used_again(tmp_path, hits):
    """Also where it was in use before: jax remembers."""

    def kept() -> int:
        return len(list(tmp_path.glob("jit*-cache")))

    with compile_cache(tmp_path):
        program()(X)
        first = kept()
        with no_compile_cache():
            jax.jit(lambda x: jnp.cos(x) @ x)(X)
        assert kept() == first and not hits
        program()(X)
    assert len(hits) == 1
