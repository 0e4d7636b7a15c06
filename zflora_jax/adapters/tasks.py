"""Adapters of several tasks for one base: brought to the same widths, stacked, chosen by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters.methods import adapter_shapes, check_adapters, live_layers
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.ops.quantized import filled

SCALED = ("backward", "lora_b")  # blocks that the adapter's scale multiplies


def pad_adapters(
    config: LlamaConfig, adapter: AdapterConfig, adapters: trees.Tree, to: AdapterConfig
) -> trees.Tree:
    """Pads adapters to a wider config, so that they compute the same.

    Blocks that only `to` has are zero, the others get zeros at the ends of their extra axes. Where
    the scales differ, `backward` and `lora_b` are multiplied by their ratio.

    Args:
      config: Config of the base.
      adapter: Config of `adapters`.
      adapters: Adapters, float32, layers stacked or not.
      to: Config of the result.

    Raises:
      ConfigError: `to` is narrower or lacks a block, or a method or setting has no wider form that
        computes the same.
    """
    both = f"adapters of {adapter.method} r={adapter.rank} as {to.method} r={to.rank}"
    for one in (adapter, to):
        require(
            METHODS[one.method].widens or METHODS[one.method].in_place == "lora",
            f"{both}: method {one.method!r} cannot be padded; its rank is part of its form.",
        )
        require(
            not one.use_dora and not one.rank_pattern and not one.alpha_pattern,
            f"{both}: adapters with use_dora, rank_pattern or alpha_pattern cannot be padded.",
        )
    config = config.replace(scan_layers="layers" in adapters)
    flat, wanted = trees.flatten(adapters), adapter_shapes(config, to)
    check_adapters(adapters, config, adapter)
    _require_room(config, adapter, flat, to, wanted)
    ratio = np.float32(adapter.scale / to.scale)

    def widen(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name not in flat:
            return jnp.zeros(shape, jnp.float32)
        leaf = filled(flat[name], shape)
        return leaf * ratio if name.rpartition("/")[2] in SCALED and ratio != 1 else leaf

    return trees.unflatten({name: widen(name, shape) for name, shape in wanted.items()})


def _require_room(
    config: LlamaConfig,
    adapter: AdapterConfig,
    flat: Mapping[str, jax.Array],
    to: AdapterConfig,
    wanted: Mapping[str, tuple[int, ...]],
) -> None:
    """ConfigError if `to`, with blocks of the shapes `wanted`, does not hold all of `adapter`'s."""
    both = f"adapters of {adapter.method} r={adapter.rank} as {to.method} r={to.rank}"
    missing = flat.keys() - wanted.keys()
    lacking = sorted({f"{name.split('/')[-1]} of {name.split('/')[-2]}" for name in missing})
    require(
        not lacking,
        f"{both}: the latter has no {', '.join(lacking)}; choose a method and targets that have"
        " every block of the former.",
    )
    narrow = [n for n, leaf in flat.items() if any(np.greater(leaf.shape, wanted[n]))]
    require(
        not narrow,
        f"{both}: {narrow[:1]} is wider than the latter; choose widths at least as large.",
    )
    room = live_layers(config, to)
    lost = [
        f"{block} of {kernel}"
        for kernel, blocks in live_layers(config, adapter).items()
        for block, layers in blocks.items()
        if not {*layers} <= {*room[kernel][block]}
    ]
    require(
        not lost,
        f"{both}: the latter has {', '.join(lost)} in fewer layers; choose layers_to_transform and"
        " targets that have all of the former's.",
    )


def stack_tasks(tasks: Sequence[trees.Tree]) -> trees.Tree:
    """Stacks the adapters of several tasks, for `rows_of`.

    Args:
      tasks: Adapters of the same AdapterConfig (see `pad_adapters`).

    Returns:
      Leaves [N, ...] for N tasks.

    Raises:
      ConfigError: there is no task, or widths differ.
      ValueError: the leaves differ.
    """
    require(len(tasks) > 0, "stack_tasks needs the adapters of at least one task.")
    first = {name: leaf.shape for name, leaf in trees.flatten(tasks[0]).items()}
    for i, task in enumerate(tasks):
        shapes = {name: leaf.shape for name, leaf in trees.flatten(task).items()}
        if diff := trees.difference(first, shapes):
            raise ValueError(f"Tasks {i} and 0 have different parameters:\n{diff}")
        wrong = [name for name in first if shapes[name] != first[name]]
        require(
            not wrong,
            f"task {i} has {wrong[:1]} of shape {shapes[wrong[0]] if wrong else ''}, task 0"
            " otherwise; bring them to one width first.",
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)


def rows_of(stacked: trees.Tree, tasks: Sequence[int] | np.ndarray) -> trees.Tree:
    """Chooses the adapters of each row of a batch.

    Args:
      stacked: Leaves [N, ...] of `stack_tasks`.
      tasks: Integers [B]; row i uses task tasks[i].

    Returns:
      Leaves [B, ...].

    Raises:
      ConfigError: a task is not in 0..N-1.
    """
    count, wanted = jax.tree.leaves(stacked)[0].shape[0], np.asarray(tasks, np.int32)
    require(
        all(0 <= task < count for task in wanted.tolist()),
        f"tasks={list(map(int, wanted))}: there are {count}, from 0.",
    )
    return jax.tree.map(lambda leaf: jnp.take(leaf, wanted, axis=0), stacked)
