"""Slices of devices: the mesh lies so that only sums over the data axis cross between them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support.checks import compiled
from support.sharded import OPTIM, batch, sharded_model

from zflora_jax.adapters.init import init_adapters
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError, from_dict
from zflora_jax.core.run_config import MeshConfig, RunConfig
from zflora_jax.parallel import mesh as mesh_module, slices
from zflora_jax.parallel.sharding import make_mesh, put_rows, shard, state_shardings
from zflora_jax.parallel.slices import arrange
from zflora_jax.training.objective import CrossEntropy
from zflora_jax.training.trainer import init_state, make_train_step


def devices(count, slice_of=None, process_of=lambda i: 0):
    return [
        SimpleNamespace(id=i, platform="cpu", device_kind="cpu", process_index=process_of(i))
        if slice_of is None
        else SimpleNamespace(
            id=i,
            platform="cpu",
            device_kind="cpu",
            process_index=process_of(i),
            slice_index=slice_of(i),
        )
        for i in range(count)
    ]


def ids(config, found):
    return np.vectorize(lambda device: device.id)(arrange(config, found)).tolist()


def test_the_devices_of_a_slice_are_neighbours():
    two = MeshConfig(data=4, fsdp=2, slices=2)
    assert ids(two, devices(8, lambda i: i % 2)) == [
        [[0], [2]],
        [[4], [6]],
        [[1], [3]],
        [[5], [7]],
    ]
    # Devices that name no slice: by processes, as many neighbours in each.
    by_process = devices(8, process_of=lambda i: i // 2)
    assert ids(two, by_process) == [[[0], [1]], [[2], [3]], [[4], [5]], [[6], [7]]]
    assert ids(MeshConfig(data=4, fsdp=2, slices=4), by_process) == ids(two, by_process)


def torus(*size):
    """A TPU v5e of so many columns and rows; each host has 2 x 2 of them."""
    hosts = [(x, y) for y in range(0, size[1], 2) for x in range(0, size[0], 2)]
    coords = [(x + dx, y + dy, 0) for x, y in hosts for dy in (0, 1) for dx in (0, 1)]
    kind = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite", core_on_chip=0)
    return [
        SimpleNamespace(**vars(kind), id=i, process_index=i // 4, slice_index=0, coords=found)
        for i, found in enumerate(coords)
    ]


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4, 1), (1, 16, 1), (2, 2, 4)])
def test_devices_along_an_axis_are_linked(shape):
    config = MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2])
    found = np.vectorize(lambda device: device.coords, otypes=[object])(
        arrange(config, torus(4, 4))
    )
    assert {*found.flat} == {device.coords for device in torus(4, 4)}
    for axis in (1, 2):  # data talks once a step
        pairs = zip(found.flat, np.roll(found, -1, axis).flat, strict=True)
        steps = [sum(min((b - a) % 4, (a - b) % 4) for a, b in zip(*x, strict=True)) for x in pairs]
        assert {*steps} == {min(shape[axis] - 1, 1)}


@pytest.mark.parametrize("slices", [1, 2])
def test_devices_that_fill_no_box_stay_in_order(slices):
    one = [device for device in torus(4, 4) if device.id < 6]
    two = [SimpleNamespace(**vars(device) | {"slice_index": 1}) for device in one]
    found = ids(MeshConfig(data=slices, fsdp=6, slices=slices), [one, one + two][slices - 1])
    assert found == [[[i] for i in range(6)]] * slices


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


def test_the_setting():
    with pytest.raises(ConfigError, match=r"mesh.data=3 is not a multiple of mesh.slices=2"):
        MeshConfig(data=3, slices=2)
    with pytest.raises(ConfigError, match=r"mesh.slices=0: must be at least 1"):
        MeshConfig(slices=0)
    # A file that is older than the setting.
    assert from_dict(RunConfig, {"mesh": {"data": 2}}).mesh == MeshConfig(data=2, slices=1)


def test_slices_that_nobody_asked_for_are_named(caplog):
    two = [
        SimpleNamespace(**vars(device) | {"id": 4 * i + device.id, "slice_index": i})
        for i in range(2)
        for device in torus(2, 2)
    ]
    # fsdp stays within a slice.
    assert ids(MeshConfig(data=2, fsdp=4), two) == [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
    assert "the devices are in 2 slices, and mesh.slices is 1" in caplog.text


def test_a_run_of_two_slices_is_loaded_onto_one(monkeypatch):
    """Eight devices of one process, which are no two slices."""
    assert mesh_module.mesh_if_there(MeshConfig(data=2, fsdp=4, slices=2)).shape["data"] == 2


# --- what crosses from slice to slice, in a compiled train step -----------------------------------


def by_parity(monkeypatch):
    """As if odd and even devices were two slices."""
    monkeypatch.setattr(
        slices,
        "slice_groups",
        lambda devices, count: [[d for d in devices if d.id % 2 == odd] for odd in range(2)],
    )


def numbers(shape, order):
    """Device numbers as XLA writes them: [4,2]T(1,0) is their range, in that shape, transposed."""
    sizes = [int(n) for n in shape.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(sizes))
    return np.arange(np.prod(sizes)).reshape(sizes).transpose(*axes)


def groups_of(line):
    """The groups of devices of a collective, in the three forms that XLA has for them."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return numbers(found[3], found[4]).reshape(int(found[1]), int(found[2])).tolist()
    of = r"groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
    found = re.search(of, line)
    assert found, line
    axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    sizes = [int(size) for size in axes.values()]
    ids = numbers(found[2], found[3]) if found[2] else np.arange(np.prod(sizes))
    inner = [list(axes).index(name) for name in re.findall(r"'(\w+)'", found[4])]
    last = np.moveaxis(ids.reshape(sizes), inner, range(-len(inner), 0))
    return last.reshape(-1, np.prod([sizes[i] for i in inner])).tolist()


def crossing(text, same_slice):
    """(operation, its result types) of each collective that has devices of both slices in a group.

    same_slice: numbers of devices -> whether they are of one.
    """
    kinds = r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\("
    found = [(re.search(kinds, line), line) for line in text.splitlines()]
    return [
        (operation[2], operation[1])
        for operation, line in found
        if operation and not all(same_slice(group) for group in groups_of(line))
    ]


def elements(types):
    """How many numbers the arrays of an HLO type have."""
    shapes = re.findall(r"\w+\[([\d,]*)\]", types)
    return sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)


@pytest.mark.soak  # test_plan.py holds it on TPU programs
def test_only_sums_of_gradients_cross_slices(monkeypatch):
    by_parity(monkeypatch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, slices=2))
    assert {d.id % 2 for d in mesh.devices[0].ravel()} == {0}
    model, adapter = sharded_model(num_layers=1), AdapterConfig("zflora-minimal", rank=8)
    adapters = init_adapters(jax.random.key(0), model, adapter)
    state = init_state(adapters, OPTIM, 10)
    where = state_shardings(state, mesh)
    step = make_train_step(
        model.config, adapter, OPTIM, 10, objective=CrossEntropy(64), state_sharding=where
    )
    with jax.set_mesh(mesh):
        text = compiled(
            step.lower(
                shard(model.params, mesh), jax.device_put(state, where), put_rows(batch(), 8, mesh)
            )
        ).as_text()
    # Groups number the devices by their place in the mesh: the first four are the first slice.
    found = crossing(text, lambda group: len({number // 4 for number in group}) == 1)
    assert found and {operation for operation, _ in found} == {"all-reduce"}
    sent = sum(elements(types) for _, types in found)
    own = sum(
        leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(shard(adapters, mesh))
    )
    assert own <= sent <= own + 64, (sent, own)  # and a few scalars
    assert trees.size(model.params) > 10 * sent
