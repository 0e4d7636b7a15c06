"""Devices that are absent: their names, their errors, and programs compiled for them."""

import numpy as np
import pytest
from support.needs import needs_libtpu

from zflora_jax.core.fields import ConfigError
from zflora_jax.parallel import targets
from zflora_jax.parallel.targets import CHIPS, target


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu:v5e:3x3", "unknown topology '3x3' of tpu:v5e: choose from 1x1, 2x2, 2x4,"),
        ("tpu:v9:2x4", "Allowed: cuda:h100, tpu:v5e, tpu:v5p, tpu:v6e, with a topology"),
        ("v5e:2x4", "unknown target 'v5e:2x4'"),
        ("v5e-8", "here that is `tpu:v5e:2x4`"),
        ("cuda:h100:3", "unknown topology '3' of cuda:h100: choose from 1, 2, 4, 8"),
        ("", "unknown target ''"),
    ],
)
def test_wrong_names_are_answered_with_those_that_exist(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        target(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu:v5e:2x4", r"pip install '.\[target-tpu\]' in a clone"),
        ("cuda:h100", r"pip install '.\[target-cuda\]' in a clone"),
    ],
)
def test_devices_that_cannot_be_made(name, said, monkeypatch) -> None:
    compilers = {platform: ("no_such_module", f"target-{platform}") for platform in ("tpu", "cuda")}
    monkeypatch.setattr(targets, "_COMPILERS", compilers)
    with pytest.raises(ConfigError, match=said):
        target(name).devices()


@needs_libtpu
@pytest.mark.parametrize(
    ("kind", "device_kind"),
    [("tpu:v5e", "TPU v5 lite"), ("tpu:v5p", "TPU v5"), ("tpu:v6e", "TPU v6 lite")],
)
def test_devices_of_every_topology_that_is_named(kind: str, device_kind: str) -> None:
    for topology in CHIPS[kind].topologies:
        found = target(f"{kind}:{topology}").devices()
        assert len(found) == int(np.prod([int(n) for n in topology.split("x")]))
        assert {device.device_kind for device in found} == {device_kind}
