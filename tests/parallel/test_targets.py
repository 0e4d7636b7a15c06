"""Devices that are absent: their names, their errors, and programs compiled for them."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from zflora_jax.core.fields import ConfigError
from zflora_jax.parallel import targets
from zflora_jax.parallel.compile_cache import no_compile_cache
from zflora_jax.parallel.targets import CHIPS, target

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra target-tpu"
)


def test_names() -> None:
    assert target("tpu:v5e:2x4").name == "tpu:v5e:2x4"
    assert target("cuda:h100").name == "cuda:h100:1"
    assert target("cuda:h100:8").topology == "8"
    assert {name.partition(":")[0] for name in CHIPS} == {"tpu", "cuda"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu:v5e:3x3", "unknown topology '3x3' of tpu:v5e: choose from 1x1, 2x2, 2x4,"),
        ("tpu:v9:2x4", "targets are tpu:v5e, tpu:v5p, tpu:v6e, cuda:h100"),
        ("v5e:2x4", "unknown target 'v5e:2x4'"),
        ("cuda:h100:3", "unknown topology '3' of cuda:h100: choose from 1, 2, 4, 8"),
        ("", "unknown target ''"),
    ],
)
def test_wrong_names_are_answered_with_those_that_exist(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        target(name)


@pytest.mark.parametrize(
    ("name", "slices", "module", "said"),
    [
        ("tpu:v5e:2x4", 1, "no_such_module", r"pip install 'zflora-jax\[target-tpu\]'"),
        ("cuda:h100", 1, "no_such_module", r"pip install 'zflora-jax\[target-cuda\]'"),
        ("cuda:h100:8", 2, "jax", "only TPUs come in several slices"),
    ],
)
def test_devices_that_cannot_be_made(name, slices, module, said, monkeypatch) -> None:
    compilers = {platform: (module, f"target-{platform}") for platform in ("tpu", "cuda")}
    monkeypatch.setattr(targets, "_COMPILERS", compilers)
    with pytest.raises(ConfigError, match=said):
        target(name).devices(slices)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices", "count", "kind"),
    [
        ("tpu:v5e:1x1", 1, 1, "TPU v5 lite"),
        ("tpu:v5e:2x4", 2, 16, "TPU v5 lite"),
        ("tpu:v5p:2x2x1", 1, 4, "TPU v5"),
        ("tpu:v6e:2x4", 1, 8, "TPU v6 lite"),
    ],
)
def test_devices(name: str, slices: int, count: int, kind: str) -> None:
    found = target(name).devices(slices)
    assert len(found) == count and {device.device_kind for device in found} == {kind}
    if slices > 1:
        assert {device.slice_index for device in found} == set(range(slices))


@needs_libtpu
@pytest.mark.parametrize("kind", [kind for kind in CHIPS if kind.startswith("tpu")])
def test_every_topology_that_is_named_exists(kind: str) -> None:
    for topology in CHIPS[kind].topologies:
        size = int(np.prod([int(n) for n in topology.split("x")]))
        assert len(target(f"{kind}:{topology}").devices()) == size


@needs_libtpu
def test_a_program_is_compiled_for_a_device_that_is_not_there() -> None:
    mesh = Mesh(np.asarray(target("tpu:v5e:1x1").devices()), ("x",))
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh), no_compile_cache():
        compiled = jax.jit(lambda x: x @ x).lower(x).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 256 * 256 * 2
    assert "estimated_cycles" in compiled.as_text()
