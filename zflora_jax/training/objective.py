"""Objectives: how a batch becomes a summed loss, its divisor and further metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.nn.llama import Llama
from zflora_jax.parallel.sharding import batch_shards, gather_fsdp
from zflora_jax.training.loss import masked_cross_entropy

Array = jax.Array
Batch = Mapping[str, Any]  # arrays by name; the first axis of each is the rows of the batch


class Sums(NamedTuple):
    """Sums over the rows of a batch, float32 scalars. They add over micro-batches and batches.

    Attributes:
      loss: The summed loss.
      divisor: The number that the loss is divided by for its mean.
      metrics: Further sums, a value for each name in `Objective.metrics`.
    """

    loss: Array
    divisor: Array
    metrics: dict[str, Array]


class Objective(ABC):
    """What a run minimises. The train step, the held-out loss and the plan of a run's memory take
    one. Compiled steps are cached by it: instances are immutable and hashable.

    Attributes:
      unit: What the divisor counts, its name among the metrics, e.g. "tokens".
      metrics: Names of the further sums, whose means are reported next to the loss.
    """

    unit: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def arrays(self, rows: int, length: int, packed: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays of a batch; "tokens" is one of them.

        Args:
          rows: Rows of the batch.
          length: Tokens of a row.
          packed: Whether a row holds several sequences.
        """

    @abstractmethod
    def __call__(
        self,
        config: LlamaConfig,
        adapter: AdapterConfig | None,
        variables: Tree,
        batch: Batch,
        rngs: dict[str, Array] | None = None,
    ) -> Sums:
        """Sums over a batch.

        Args:
          config: The base's config.
          adapter: The config of variables["adapters"]; None for a model without adapters.
          variables: {"params": ..., "adapters": ...}. An objective that compares with the base
            applies it with {"params": ...} and adapter None.
          batch: The arrays that `arrays` lists.
          rngs: {"dropout": key} in training with dropout.
        """


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy in nats of the tokens that loss_mask chooses.

    Its batches: tokens [B, T] int32, loss_mask [B, T] bool and, if packed, segments [B, T] int32.
    Without segments each row is one sequence, padded on the right, where no real token sees it.

    Attributes:
      chunk: Positions whose logits exist at one time.
    """

    chunk: int = 256
    unit: ClassVar[str] = "tokens"

    def arrays(self, rows: int, length: int, packed: bool) -> dict[str, jax.ShapeDtypeStruct]:
        dtypes = {"tokens": jnp.int32, "loss_mask": jnp.bool_}
        if packed:
            dtypes["segments"] = jnp.int32
        return {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in dtypes.items()}

    def __call__(
        self,
        config: LlamaConfig,
        adapter: AdapterConfig | None,
        variables: Tree,
        batch: Batch,
        rngs: dict[str, Array] | None = None,
    ) -> Sums:
        llama = Llama(config, adapter)
        hidden, _ = llama.apply(
            variables,
            batch["tokens"],
            segment_ids=batch.get("segments"),
            method="hidden",
            rngs=rngs,
        )  # type: ignore[misc]
        name = "embed/embedding" if config.tie_word_embeddings else "lm_head/kernel"
        # Gathered once, ahead of the loop over chunks; the lookup has the divided table.
        head = {
            collection: trees.map_with_names(
                lambda n, x: gather_fsdp(n, x) if n == name else x, tree
            )
            for collection, tree in variables.items()
        }
        loss, tokens = masked_cross_entropy(
            lambda x: llama.apply(head, x, method="logits"),  # type: ignore[return-value,arg-type]
            hidden,
            batch["tokens"],
            batch["loss_mask"],
            self.chunk,
            batch_shards(),
        )
        return Sums(loss, tokens, {})


CROSS_ENTROPY = CrossEntropy()


def objective_of(run: RunConfig) -> Objective:
    """The objective that the settings of `run` choose."""
    return CrossEntropy(run.train.loss_chunk)
