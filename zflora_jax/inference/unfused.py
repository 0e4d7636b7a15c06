"""Adapters that run beside the base instead of fused into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from zflora_jax.adapters.tasks import rows_of
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.trees import Tree
from zflora_jax.inference.batching import Batch
from zflora_jax.parallel.mesh import place_like


@dataclass(frozen=True, eq=False)
class UnfusedAdapters:
    """An adapter, its tree, and which prompt uses which part of it.

    Attributes:
      config: of the adapter.
      tree: its leaves; with tasks each has a leading axis of tasks (`adapters.tasks.stack_tasks`).
      tasks: index of the task of each prompt; None where `tree` is of all prompts.
    """

    config: AdapterConfig
    tree: Tree
    tasks: Sequence[int] | None = None

    def placed(self, run: Model) -> UnfusedAdapters:
        """These adapters where the parameters of the packed model `run` lie, in its layout."""
        tree = place_like(run.params, self.tree)
        if self.tasks is None:
            tree = trees.unstack_layers(tree, run.config.num_layers)
        return replace(self, tree=tree)

    def variables(self, run: Model, batch: Batch, size: int) -> Tree:
        """The variables beside `params` for the prompts of `batch`, in arrays of `size` rows."""
        if self.tasks is None:
            return {"adapters": self.tree}
        own = rows_of(self.tree, np.resize([self.tasks[i] for i in batch.rows], size))
        return {"row_adapters": trees.unstack_layers(own, run.config.num_layers, axis=1)}


def unfused_adapters(
    adapter: AdapterConfig | None, adapters: Tree | None, tasks: Sequence[int] | None, prompts: int
) -> UnfusedAdapters | None:
    """The keywords of `generate_tokens` as one value, None without an adapter.

    Args:
      adapter, adapters, tasks: see `generate_tokens`.
      prompts: how many prompts there are.

    Raises:
      ConfigError: keywords that do not go together.
    """
    require(
        (adapter is None) == (adapters is None),
        "adapter and adapters go together: give both, or neither.",
    )
    require(
        tasks is None or adapters is not None,
        "tasks says whose adapters a prompt uses: give adapter and adapters too.",
    )
    require(
        tasks is None or len(tasks) == prompts,
        f"{prompts} prompts and {0 if tasks is None else len(tasks)} tasks: give one for each.",
    )
    return (
        None if adapter is None or adapters is None else UnfusedAdapters(adapter, adapters, tasks)
    )
