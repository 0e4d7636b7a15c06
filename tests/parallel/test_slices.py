"""Slices of devices: the mesh lies so that only sums over the data axis cross between them. That
no other collective does is shown on TPU programs, in test_plan.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import MeshConfig
from zflora_jax.parallel import mesh as mesh_module
from zflora_jax.parallel.sharding import arrange


def devices(count, slice_of=None, process_of=lambda i: 0):
    found = []
    for i in range(count):
        of = {} if slice_of is None else {"slice_index": slice_of(i)}
        of |= {"platform": "cpu", "device_kind": "cpu", "process_index": process_of(i)}
        found.append(SimpleNamespace(id=i, **of))
    return found


def ids(config, found):
    return np.vectorize(lambda device: device.id)(arrange(config, found)).tolist()


def test_the_devices_of_a_slice_are_neighbours():
    two = MeshConfig(data=4, fsdp=2, slices=2)
    wanted = [[[0], [2]], [[4], [6]], [[1], [3]], [[5], [7]]]
    assert ids(two, devices(8, lambda i: i % 2)) == wanted
    # Devices that name no slice: by processes, as many neighbours in each.
    by_process = devices(8, process_of=lambda i: i // 2)
    assert ids(two, by_process) == [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]
    assert ids(MeshConfig(data=4, fsdp=2, slices=4), by_process) == ids(two, by_process)


def torus(*size, slices=1):
    """TPU v5e slices of so many columns and rows; each host has 2 x 2 of them."""
    hosts = [(x, y) for y in range(0, size[1], 2) for x in range(0, size[0], 2)]
    coords = [(x + dx, y + dy, 0) for x, y in hosts for dy in (0, 1) for dx in (0, 1)] * slices
    kind = {"platform": "tpu", "device_kind": "TPU v5 lite", "core_on_chip": 0}
    return [
        SimpleNamespace(
            **kind, id=i, process_index=i // 4, slice_index=i * slices // len(coords), coords=found
        )
        for i, found in enumerate(coords)
    ]


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4, 1), (1, 16, 1), (2, 2, 4)])
def test_devices_along_an_axis_are_linked(shape):
    coords = np.vectorize(lambda device: device.coords, otypes=[object])
    found = coords(arrange(MeshConfig(*shape), torus(4, 4)))
    assert {*found.flat} == {device.coords for device in torus(4, 4)}
    for axis in (1, 2):  # data talks once a step
        pairs = zip(found.flat, np.roll(found, -1, axis).flat, strict=True)
        steps = [sum(min((b - a) % 4, (a - b) % 4) for a, b in zip(*x, strict=True)) for x in pairs]
        assert {*steps} == {min(shape[axis] - 1, 1)}


def test_devices_that_fill_no_box_or_are_in_other_slices_stay_in_order(caplog):
    six = [device for device in torus(4, 4) if device.id < 6]
    assert ids(MeshConfig(fsdp=6), six) == [[[i] for i in range(6)]]
    assert not caplog.text
    two = torus(2, 2, slices=2)  # fsdp stays within a slice
    assert ids(MeshConfig(data=2, fsdp=4), two) == [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
    assert "the devices are in 2 slices, and mesh.slices is 1" in caplog.text


@pytest.mark.parametrize(
    ("found", "groups"),
    [
        (devices(8), "8"),  # one process
        (devices(8, lambda i: i // 2), "2, 2, 2, 2"),
        (devices(8, lambda i: int(i > 2)), "3, 5"),
        (devices(8, process_of=lambda i: min(i, 2)), "1, 1, 6"),
    ],
)
def test_devices_in_other_slices_are_refused(found, groups):
    with pytest.raises(ConfigError, match=f"mesh.slices=2: the 8 devices .* of {groups} "):
        arrange(MeshConfig(data=2, fsdp=4, slices=2), found)


def test_a_run_of_two_slices_is_loaded_onto_one():
    """Eight devices of one process, which are no two slices."""
    assert mesh_module.mesh_if_there(MeshConfig(data=2, fsdp=4, slices=2)).shape["data"] == 2
