"""Objectives, which turn a batch into a summed loss, its divisor and further metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.nn.llama import Llama
from zflora_jax.parallel.sharding import batch_shards, gather_fsdp
from zflora_jax.training.loss import masked_cross_entropy, pair_sums

Array = jax.Array
Batch = Mapping[str, Any]  # arrays by name; the first axis of each is the rows of the batch


class Sums(NamedTuple):
    """Sums over the rows of a batch, float32 scalars: the loss, the divisor for its mean, and a
    value for each name in `Objective.metrics`. They add over micro-batches and batches.
    """

    loss: Array
    divisor: Array
    metrics: dict[str, Array]


class Objective(ABC):
    """The loss that a run minimises. The train step, the held-out loss and the memory plan use it.
    Compiled steps are cached by it, so instances are immutable and hashable.
    """

    unit: ClassVar[str]  # what the divisor counts, its name among the metrics, e.g. "tokens"
    metrics: ClassVar[tuple[str, ...]] = ()  # further sums, whose means are reported
    # Whether XLA may keep more precision than a dtype has when it fuses operations.
    excess_precision: ClassVar[bool] = True

    @abstractmethod
    def arrays(self, rows: int, length: int, packed: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the arrays of a batch of `rows` rows of `length` tokens, "tokens"
        among them. packed: Whether a row holds several sequences.
        """

    def take(self, batch: Batch, packed: bool = False) -> dict[str, Any]:
        """Returns the arrays of `batch` that `arrays` names. Without segments causal attention is
        enough, which is fastest in flash kernels.
        """
        rows, length = batch["tokens"].shape
        return {name: batch[name] for name in self.arrays(rows, length, packed)}

    @abstractmethod
    def __call__(
        self,
        config: LlamaConfig,
        adapter: AdapterConfig | None,
        variables: Tree,
        batch: Batch,
        rngs: dict[str, Array] | None = None,
    ) -> Sums:
        """Returns the sums over a batch.

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
    """Cross-entropy in nats of the tokens in loss_mask, `chunk` positions at one time.

    Without segments each row is one sequence, padded on the right, where no real token sees it.
    """

    chunk: int = 512
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
        hidden, logits = _hidden_and_head(config, adapter, variables, batch, rngs)
        tokens, mask, shards = batch["tokens"], batch["loss_mask"], batch_shards()
        with jax.named_scope("loss"):
            return Sums(*masked_cross_entropy(logits, hidden, tokens, mask, self.chunk, shards), {})


CROSS_ENTROPY = CrossEntropy()


@dataclass(frozen=True)
class DirectPreference(Objective):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7): -log sigmoid of the reward margin.
    The margin is `beta` times the change that the adapters make to log p(chosen) - log p(rejected)
    of a pair. The base, also a quantised one, is the reference.

    A row holds a pair: segment 1 is the chosen sequence, segment 2 the rejected one. Metrics are
    means over pairs: reward_margin, reward_accuracy (the share of margins above 0) and kl, the
    divergence from the base in nats per learned token.
    """

    beta: float = 0.1
    chunk: int = 512
    unit: ClassVar[str] = "pairs"
    metrics: ClassVar[tuple[str, ...]] = ("reward_margin", "reward_accuracy", "kl")
    # Otherwise XLA rounds the reference's pass differently from the differentiated one.
    excess_precision: ClassVar[bool] = False

    def arrays(self, rows: int, length: int, packed: bool) -> dict[str, jax.ShapeDtypeStruct]:
        return CROSS_ENTROPY.arrays(rows, length, packed=True)

    def __call__(
        self,
        config: LlamaConfig,
        adapter: AdapterConfig | None,
        variables: Tree,
        batch: Batch,
        rngs: dict[str, Array] | None = None,
    ) -> Sums:
        if adapter is None:
            raise ConfigError(
                "train.loss=dpo compares adapters with their base, and this model has no unmerged"
                " adapters: its loss would be ln 2, whatever it learned. Use the held-out loss in"
                " the run's report.json, or give the adapters unmerged (`zf.unfuse`)."
            )
        hidden, logits = _hidden_and_head(config, adapter, variables, batch, rngs)
        base = {"params": variables["params"]}
        with jax.named_scope("reference"):
            reference, head = _hidden_and_head(config, None, base, batch, None)
        with jax.named_scope("loss"):
            shards = batch_shards()
            sums = pair_sums(logits, head, hidden, reference, batch, self.chunk, shards)
        gains = sums.log_p - sums.reference
        margins = self.beta * (gains[:, 0] - gains[:, 1])
        tokens = jnp.sum(sums.tokens, axis=1)
        counts = tokens > 0  # rows that fill a batch up have none

        def total(values: Array) -> Array:
            return jnp.sum(jnp.where(counts, values, 0.0))

        metrics = {
            "reward_margin": total(margins),
            "reward_accuracy": total((margins > 0).astype(jnp.float32)),
            "kl": total(jnp.sum(sums.kl, axis=1) / jnp.maximum(tokens, 1.0)),
        }
        pairs = jnp.sum(counts).astype(jnp.float32)
        return Sums(total(-jax.nn.log_sigmoid(margins)), pairs, metrics)


def _hidden_and_head(
    config: LlamaConfig,
    adapter: AdapterConfig | None,
    variables: Tree,
    batch: Batch,
    rngs: dict[str, Array] | None,
) -> tuple[Array, Callable[[Array], Array]]:
    """The inputs of a model's head for a batch, and the head."""
    llama = Llama(config, adapter)
    name = "embed" if config.tie_word_embeddings else "lm_head"
    # Gathered once for all chunks; the lookup uses the divided table.
    head = gather_fsdp({key: {name: x[name]} for key, x in variables.items() if name in x})
    hidden, _ = llama.apply(  # type: ignore[misc]
        variables, batch["tokens"], segment_ids=batch.get("segments"), method="hidden", rngs=rngs
    )

    def logits(x: Array) -> Array:
        return llama.apply(head, x, method="logits")  # type: ignore[return-value,arg-type]

    return hidden, logits


def objective_of(run: RunConfig) -> Objective:
    """The objective that the settings of `run` choose."""
    if run.train.pairs:
        return DirectPreference(run.train.dpo_beta, run.train.loss_chunk)
    return CrossEntropy(run.train.loss_chunk)
