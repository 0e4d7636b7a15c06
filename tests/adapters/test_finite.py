"""NaN is never taken for a good number: in an export's gap, the last update, held-out losses,
likelihoods and choices among losses.
"""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from support.grids import always
from support.models import tiny_model
from support.runs import EVAL

from zflora_jax import CheckpointError, Model, NonFiniteError, export_gap, override, save_hf, train
from zflora_jax.core import trees
from zflora_jax.data.tasks import Example
from zflora_jax.evaluation import export_gap as gap_module, loss as loss_module
from zflora_jax.evaluation.records import likelihood_records
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.objective import Sums


def spoilt(model: Model, value: float = np.nan) -> Model:
    """`model` with one float replaced."""
    params = trees.map_with_names(
        lambda name, x: x.at[0].set(value) if name == "final_norm/scale" else x, model.params
    )
    return dataclasses.replace(model, params=params)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_gap_of_nan_is_an_error(tmp_path, monkeypatch, value):
    model, out, tokens = tiny_model(), tmp_path / "out", [[5, 6, 7, 8]]
    save_hf(out, model)
    assert export_gap(model, out, tokens)["max_abs_dlogit"] < 1e-4
    with pytest.raises(CheckpointError, match="logits of the model in memory are NaN or infinite"):
        export_gap(spoilt(model, value), out, tokens)
    monkeypatch.setattr(gap_module, "load_stock", lambda *_: spoilt(model, value))
    with pytest.raises(
        CheckpointError,
        match=r"logits of the export at .*out are NaN or infinite, so do not use the export",
    ):
        export_gap(model, out, tokens)


@pytest.mark.parametrize("value", always([np.nan, np.inf], np.isinf))
def test_a_last_update_that_is_not_finite_is_not_the_result(run, tmp_path, monkeypatch, value):
    """The loss and the gradient before it are fine, so nothing else would notice."""
    real = optax.apply_updates

    def apply(adapters, updates):
        adapters = real(adapters, updates)
        first, *rest = jax.tree.leaves(adapters)
        first = first.ravel().at[0].set(np.float32(value)).reshape(first.shape)
        return jax.tree.unflatten(jax.tree.structure(adapters), [first, *rest])

    monkeypatch.setattr("optax.apply_updates", apply)
    # Programs of its own.
    run = override(
        run, {"train.steps": 1, "optim.warmup_steps": 0, "train.loss_chunk": 96 + (value > 0)}
    )
    said = "an adapter is NaN or infinite at step 1; training stopped"
    with pytest.raises(NonFiniteError, match=said):
        train(run, tmp_path, console=False)
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.latest is None
    assert not (tmp_path / "report.json").exists()


def test_a_held_out_loss_of_nan_ends_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loss_module, "eval_step", lambda *_: Sums(np.float32("nan"), np.float32(1), {})
    )
    saved = (
        r"after step 3 the held-out loss is nan.*The checkpoint of step 3 is saved: remove"
        r" .*checkpoints.3 to go back"
    )
    with pytest.raises(NonFiniteError, match=saved):
        train(override(run, {"train.steps": 3}), tmp_path, console=False)
    assert not (tmp_path / "report.json").exists()


def test_likelihoods_of_nan_choose_no_option(model, arc, monkeypatch):
    rows = [Example("q", "a", "a", options=("a", "b")), Example("q", "b", "b", options=("a", "b"))]
    found = [np.asarray([-1.0, np.nan]), np.asarray([-1.0, -2.0])]
    monkeypatch.setattr("zflora_jax.inference.likelihood._score", lambda *_: found)
    with pytest.raises(NonFiniteError, match="log-likelihoods are NaN or infinite"):
        likelihood_records(model, rows, arc, EVAL)


def test_the_best_checkpoint_has_a_loss(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=3) as checkpoints:
        for step, loss in ((1, float("nan")), (2, 3.0), (3, 2.5)):
            checkpoints.save(step, {"leaf": jax.numpy.zeros(4)}, {"loss": loss})
    with Checkpoints(tmp_path, max_to_keep=3, create=False) as checkpoints:
        assert checkpoints.best == 3
