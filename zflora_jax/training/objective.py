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
    """Sums over the rows of a batch, float32 scalars: the loss, what it is divided by for its mean,
    and a value for each name in `Objective.metrics`. They add over micro-batches and batches.
    """

    loss: Array
    divisor: Array
    metrics: dict[str, Array]


class Objective(ABC):
    """What a run minimises. The train step, the held-out loss and the plan of a run's memory take
    one. Compiled steps are cached by it: instances are immutable and hashable.
    """

    unit: ClassVar[str]  # what the divisor counts, its name among the metrics, e.g. "tokens"
    metrics: ClassVar[tuple[str, ...]] = ()  # further sums, whose means are reported

    @abstractmethod
    def arrays(self, rows: int, length: int, packed: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays of a batch of `rows` rows of `length` tokens, "tokens"
        among them. packed: Whether a row holds several sequences.
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
    """Cross-entropy in nats of the tokens that loss_mask chooses, with the logits of `chunk`
    positions at one time.

    Without segments each row is one sequence, padded on the right, where no real token sees it.
    """

    chunk: int = 256
    unit: ClassVar[str] = "tokens"

    def arrays(self, rows: int, length: int, packed: bool) -> dict[str, jax.ShapeDtypeStruct]:
        dtypes = {"tokens": jnp.int32, "loss_mask": jnp.bool_}
        dtypes |= {"segments": jnp.int32} if packed else {}
        return {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in dtypes.items()}

    def __call__(
        self,
        config: LlamaConfig,
        adapter: AdapterConfig | None,
        variables: Tree,
        batch: Batch,
        rngs: dict[str, Array] | None = None,
    ) -> Sums:
        llama, tokens, segments = Llama(config, adapter), batch["tokens"], batch.get("segments")
        hidden, _ = llama.apply(  # type: ignore[misc]
            variables, tokens, segment_ids=segments, method="hidden", rngs=rngs
        )
        name = "embed/embedding" if config.tie_word_embeddings else "lm_head/kernel"
        # Gathered once, ahead of the loop over chunks; the lookup has the divided table.
        head = {
            collection: trees.map_with_names(
                lambda n, x: gather_fsdp(n, x) if n == name else x, tree
            )
            for collection, tree in variables.items()
        }

        def logits(x: Array) -> Array:
            return llama.apply(head, x, method="logits")  # type: ignore[return-value,arg-type]

        mask, shards = batch["loss_mask"], batch_shards()
        return Sums(*masked_cross_entropy(logits, hidden, tokens, mask, self.chunk, shards), {})


CROSS_ENTROPY = CrossEntropy()


def objective_of(run: RunConfig) -> Objective:
    """The objective that the settings of `run` choose."""
    return CrossEntropy(run.train.loss_chunk)
