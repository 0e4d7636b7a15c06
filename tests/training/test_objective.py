"""Another objective needs a class: the train step and the held-out loss take it as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from support.models import perturb, tiny_model
from support.runs import quiet_train
from support.sharded import pairs

from zflora_jax import AdapterConfig, OptimConfig, init_adapters, override
from zflora_jax.evaluation import loss as loss_module
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training import trainer
from zflora_jax.training.objective import CrossEntropy, DirectPreference, Sums
from zflora_jax.training.trainer import TrainStep, init_state

DPO = DirectPreference(beta=1.0)
ADAPTER = AdapterConfig("zflora-minimal", rank=4)


def test_the_gradient_is_that_of_the_mean():
    """SGD's first update at rate 1 is minus it."""
    model = tiny_model()
    optim = OptimConfig(1.0, "constant", 0, clip_norm=None, optimizer="sgd", b1=0.0)
    adapters = perturb(init_adapters(jax.random.key(0), model, ADAPTER))
    step = TrainStep(model.config, ADAPTER, optim, 9, DPO).jitted()

    def mean(a):
        variables = {"params": model.params, "adapters": a}
        return DPO(model.config, ADAPTER, variables, pairs(4)).loss / 4

    grads, start = jax.jit(jax.grad(mean))(adapters), jax.tree.map(np.array, adapters)
    state, _ = step(model.params, init_state(adapters, optim, 9), pairs(4))
    for new, old, grad in zip(*map(jax.tree.leaves, (state.adapters, start, grads)), strict=True):
        np.testing.assert_allclose(old - new, grad, rtol=1e-4, atol=2e-5 * np.abs(grad).max())


@dataclass(frozen=True)
class Weighted(CrossEntropy):
    """Cross-entropy times `weight`, with a further metric."""

    weight: float = 1.0
    metrics: ClassVar[tuple[str, ...]] = ("plain",)

    def __call__(self, *args, **settings):
        sums = super().__call__(*args, **settings)
        return Sums(self.weight * sums.loss, sums.divisor, {"plain": sums.loss})


def test_a_run_logs_and_evaluates_what_its_objective_says(run, tmp_path, monkeypatch):
    run = override(run, {"train.steps": 3})
    plain = quiet_train(run, tmp_path / "plain").report
    weighted = lambda run: Weighted(run.train.loss_chunk, weight=3.0)  # noqa: E731
    for module in (trainer, loss_module):
        monkeypatch.setattr(module, "objective_of", weighted)
    # Adam's updates do not depend on the scale of a loss, but for its eps.
    run = override(run, {"optim.eps": 1e-30, "optim.clip_norm": None})
    found = quiet_train(run, tmp_path / "weighted").report
    np.testing.assert_allclose(found["test_loss"], 3 * plain["test_loss"], rtol=0.05)
    for record in read_metrics(tmp_path / "weighted" / "metrics.jsonl"):
        np.testing.assert_allclose(record["loss"], 3 * record["plain"], rtol=1e-6)
        assert record["tokens"] > 0
