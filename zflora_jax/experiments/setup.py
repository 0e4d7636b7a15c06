"""What a run trains on, made from its settings: base model, mesh, training and evaluation rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from zflora_jax.adapters.split_base import split_base
from zflora_jax.core.model import Model, fingerprint, require_fit
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.pipeline import pack_sequences
from zflora_jax.data.tokenization import Encoded, tokenize_examples
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.experiments.base import given_base, load_base
from zflora_jax.parallel.sharding import shard, state_shardings
from zflora_jax.training.trainer import TrainState, fresh_state


@dataclass(frozen=True)
class Setup:
    """A run before its first step.

    Attributes:
      run: its settings.
      mesh: the devices that it runs on.
      model: its base, divided over the mesh; without `start`, if there is one.
      train_set: the training rows; packed ones hold several examples.
      examples: how many training examples there are.
      plain: whether they are texts as they stand, whatever data.prompt_style says.
      eval_set: the evaluation rows.
      fingerprints: of base and data, under the names that checkpoints and reports have for them.
      seconds: what loading the base and preparing the data took.
      state_shardings: where the leaves of the state lie, a TrainState of NamedShardings.
      start: first adapters that `split_base` took out of the base; None where they are random.
    """

    run: RunConfig
    mesh: Mesh
    model: Model
    train_set: Encoded
    examples: int
    plain: bool
    eval_set: Encoded
    fingerprints: dict[str, str]
    seconds: dict[str, float]
    state_shardings: Any
    start: Tree | None = None

    def _fresh_state(self, params: Tree, start: Tree | None) -> TrainState:
        return fresh_state(self.run, replace(self.model, params=params), start)

    def fresh_state(self) -> TrainState:
        """The state before the first step. Each device makes its own part."""
        fresh = jax.jit(self._fresh_state, out_shardings=self.state_shardings)
        return fresh(self.model.params, self.start)

    def state_like(self) -> TrainState:
        """ShapeDtypeStructs of the state, with where each leaf belongs; nothing is computed."""
        shapes = jax.eval_shape(self._fresh_state, self.model.params, self.start)
        like = jax.ShapeDtypeStruct
        return jax.tree.map(
            lambda x, s: like(x.shape, x.dtype, sharding=s), shapes, self.state_shardings
        )

    def held_out_loss(self, adapters: Tree) -> dict[str, float]:
        """The loss of `adapters` on the evaluation rows; see `loss.held_out_loss`."""
        return held_out_loss(self.run, self.model, self.eval_set, adapters)


def prepare(run: RunConfig, mesh: Mesh, model: Model | None, started: float) -> Setup:
    """Load what `run` trains on.

    Args:
      run: its settings.
      mesh: what the base is divided over.
      model: the run's base if it is loaded already, see `base.given_base`.
      started: time.perf_counter() when the run began.

    Raises:
      ConfigError: base, data and settings do not go together. Nothing was written by then.
    """
    model = load_base(run, mesh) if model is None else given_base(run, model)
    loaded = time.perf_counter()
    rows = load_mixture(run.data, "train")
    train_set = tokenize_examples(rows, model.tokenizer, run.data, model.config.vocab_size)
    examples, plain = len(train_set), all(part[0].plain for part in rows.parts)
    if run.data.packing:
        train_set = pack_sequences(train_set, run.data.bucket_lengths[-1])
    eval_set = held_out(run, model)
    fingerprints = {
        "base_fingerprint": fingerprint(model),
        "data_fingerprint": train_set.fingerprint(),
    }
    model = replace(model, params=shard(model.params, mesh))
    model, start = split_base(model, run.adapter)
    where = state_shardings(jax.eval_shape(lambda: fresh_state(run, model, start)), mesh)
    seconds = {"load_seconds": loaded - started, "data_seconds": time.perf_counter() - loaded}
    return Setup(
        run, mesh, model, train_set, examples, plain, eval_set, fingerprints, seconds, where, start
    )


def held_out(run: RunConfig, model: Model, split: str | None = None) -> Encoded:
    """The evaluation rows of a run: at most eval.limit, in their order.

    split: None for eval.split.
    """
    require_fit(run, model)
    examples = load_mixture(run.data, split or run.eval.split, run.eval.limit)
    return tokenize_examples(examples, model.tokenizer, run.data, model.config.vocab_size)
