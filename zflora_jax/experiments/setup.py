"""The model, data and mesh of a run, made from its settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from zflora_jax.adapters.init import split_base
from zflora_jax.core.model import Model, fingerprint, require_fit
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.data.encoding import Encoded, tokenize_examples
from zflora_jax.data.mixture import Mixture, load_mixture
from zflora_jax.data.pipeline import pack_sequences
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.experiments.base import given_base, load_base
from zflora_jax.experiments.plan import step_attention
from zflora_jax.experiments.saved_step import each_length, load_steps
from zflora_jax.experiments.step_shapes import step_arguments
from zflora_jax.parallel.distributed import require_equal
from zflora_jax.parallel.sharding import shard, state_shardings
from zflora_jax.training.trainer import TrainState, fresh_state, step_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """A run before its first step."""

    run: RunConfig  # with the steps of train.epochs
    mesh: Mesh
    model: Model  # the base, divided over the mesh, without `start`; with the run's execution
    start: Tree | None  # first adapters, removed from the base; None if they are random
    state_like: TrainState  # shapes, dtypes and shardings of the state
    attention: tuple[str, str]  # the kernel of the step, and why it is no flash kernel, or ""
    train_set: Encoded  # packed rows hold several examples
    examples: int  # number of training examples
    plain: bool  # whether they are plain texts, whatever data.prompt_style is
    eval_set: Encoded
    fingerprints: dict[str, str]  # of base and data, by their names in checkpoints and reports
    steps: Mapping[int, Any] = field(default_factory=dict)  # compiled steps, by length of rows

    @property
    def shardings(self) -> TrainState:
        """Shardings of the state, a TrainState of NamedShardings."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state_like)

    def fresh_state(self) -> TrainState:
        """Returns the state before the first step. Each device makes its own part."""
        fresh = jax.jit(
            lambda params, start: fresh_state(self.run, replace(self.model, params=params), start),
            out_shardings=self.shardings,
        )
        return fresh(self.model.params, self.start)

    def with_steps(self, path: str | Path) -> Setup:
        """Returns a copy with the compiled steps of a file; see `saved_step.load_steps`."""
        step: Any = step_of(self.run, self.model.config, self.shardings)
        lowered = {}
        for length, one in each_length(self.run):
            *_, batch = step_arguments(one, self.model.config, self.mesh)
            with jax.set_mesh(self.mesh):
                lowered[length] = step.lower(self.model.params, self.state_like, batch)
        return replace(self, steps=load_steps(path, self.run, self.mesh, lowered))

    def held_out_loss(
        self, adapters: Tree, on_batch: Callable[[int], None] | None = None
    ) -> dict[str, float]:
        """Returns the loss of `adapters` on the evaluation rows; see `loss.held_out_loss`."""
        return held_out_loss(self.run, self.model, self.eval_set, adapters, on_batch)


def prepare(run: RunConfig, mesh: Mesh, model: Model | None) -> Setup:
    """Loads the base and the data of a run.

    Args:
      run: The run's settings.
      mesh: The mesh that the base is divided over.
      model: The run's base if it is loaded already, see `base.given_base`.

    Raises:
      ConfigError: Base, data and settings do not fit together. Nothing has been written.
    """
    model = load_base(run, mesh) if model is None else given_base(run, model)
    rows = load_mixture(run.data, "train")
    log.info("tokenising %d training rows of %s", len(rows), run.data.task)
    examples, train_set = sequences(rows, run, model)
    run = run.in_steps(len(train_set))
    data = train_set.fingerprint()
    fingerprints = {"base_fingerprint": fingerprint(model), "data_fingerprint": data}
    require_equal({"train_rows": examples, **fingerprints})
    eval_set = held_out(run, model)
    model, start = split_base(replace(model, params=shard(model.params, mesh)), run.adapter)
    like, attention = state_like(run, model, start, mesh), step_attention(run, model.config, mesh)
    plain, made = all(part[0].plain for part in rows.parts), (run, mesh, model, start, like)
    return Setup(*made, attention, train_set, examples, plain, eval_set, fingerprints)


def sequences(rows: Mixture, run: RunConfig, model: Model) -> tuple[int, Encoded]:
    """Returns (number of training rows that fit, the sequences that a run trains on)."""
    found = _tokenized(rows, run, model)
    top = run.data.bucket_lengths[-1]
    return len(found), pack_sequences(found, top) if run.data.packing else found


def _tokenized(examples: Mixture, run: RunConfig, model: Model) -> Encoded:
    size, pairs = model.config.vocab_size, run.train.pairs
    return tokenize_examples(examples, model.tokenizer, run.data, size, pairs)


def state_like(run: RunConfig, model: Model, start: Tree | None, mesh: Mesh | None) -> TrainState:
    """Returns the state of a run as ShapeDtypeStructs, placed on `mesh` if there is one.

    Args:
      model, start: The results of `adapters.init.split_base`.
    """
    shapes = jax.eval_shape(lambda: fresh_state(run, model, start))
    if mesh is None:
        return shapes
    where = state_shardings(shapes, mesh)
    return jax.tree.map(lambda leaf, at: leaf.update(sharding=at), shapes, where)


def held_out(run: RunConfig, model: Model, split: str | None = None) -> Encoded:
    """Returns the rows of the held-out loss, tokenised. All processes of a run call this, because
    with different numbers of batches they would wait for each other.

    Args:
      run: The run's settings; eval.limit is the number of rows.
      model: The base or a fused model.
      split: "train", "validation" or "test"; None: eval.split.
    """
    require_fit(run, model)
    split = split or run.eval.split
    examples = load_mixture(run.data, split, run.eval.limit)
    rows = _tokenized(examples, run, model)
    require_equal({f"{split}_rows": len(rows), f"{split}_fingerprint": rows.fingerprint()})
    return rows


def split_loss(
    run: RunConfig, model: Model, split: str, adapters: Tree | None = None
) -> dict[str, float]:
    """Returns the held-out loss of a run's task on at most eval.limit rows of a split.

    Args:
      run: The run's settings.
      model: The base or a fused model, see `load_base`.
      split: "validation" or "test".
      adapters: The run's trained adapters; None: the model without adapters.

    Returns:
      The result of `held_out_loss`.
    """
    return held_out_loss(run, model, held_out(run, model, split), adapters)
