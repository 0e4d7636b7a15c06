"""NaN is never taken for a good number: in an export's gap, the last update, held-out losses,
likelihoods and choices among losses.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from support.models import tiny_model
from support.runs import EVAL

from zflora_jax.core import trees
from zflora_jax.core.errors import CheckpointError, NonFiniteError
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.tasks import Example
from zflora_jax.evaluation import export_gap as gap_module, loss as loss_module, records
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.evaluation.records import likelihood_records
from zflora_jax.experiments import quickstart
from zflora_jax.experiments.train import train
from zflora_jax.hf.save import save_hf
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.objective import Sums

TOKENS = [[5, 6, 7, 8]]


def spoilt(model: Model, value: float = np.nan) -> Model:
    """`model` with one number replaced."""
    params = trees.map_with_names(
        lambda name, x: x.at[0].set(value) if name == "final_norm/scale" else x, model.params
    )
    return dataclasses.replace(model, params=params)


# --- the export -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gap_to_no_numbers_is_an_error(tmp_path, monkeypatch, value):
    model = tiny_model()
    save_hf(tmp_path / "out", model)
    assert export_gap(model, tmp_path / "out", TOKENS)["max_abs_dlogit"] < 1e-4
    with pytest.raises(CheckpointError, match="logits of the model in memory are NaN or infinite"):
        export_gap(spoilt(model, value), tmp_path / "out", TOKENS)
    monkeypatch.setattr(gap_module, "load_stock", lambda *_: spoilt(model, value))
    with pytest.raises(
        CheckpointError,
        match=r"logits of the export at .*out are NaN or infinite, so the export is not to be used",
    ):
        export_gap(model, tmp_path / "out", TOKENS)


# --- training -------------------------------------------------------------------------------------


def spoil_update(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Updates leave a number that is none, with a loss and a gradient that are."""
    real = optax.apply_updates

    def apply(adapters, updates):
        adapters = real(adapters, updates)
        first, *rest = jax.tree.leaves(adapters)
        first = first.ravel().at[0].set(np.float32(value)).reshape(first.shape)
        return jax.tree.unflatten(jax.tree.structure(adapters), [first, *rest])

    monkeypatch.setattr("optax.apply_updates", apply)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_last_update_that_is_no_number_is_not_the_result(run, tmp_path, monkeypatch, value):
    """The loss before it is fine, so nothing else would notice."""
    # Programs of its own.
    run = override(
        run, {"train.steps": 1, "optim.warmup_steps": 0, "train.loss_chunk": 96 + (value > 0)}
    )
    with monkeypatch.context() as patch:
        spoil_update(patch, value)
        with pytest.raises(
            NonFiniteError,
            match="an adapter is NaN or infinite at step 1; training stopped",
        ):
            train(run, tmp_path, console=False)
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.latest is None
    assert not (tmp_path / "report.json").exists()


def test_a_held_out_loss_that_is_no_number_ends_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        loss_module, "eval_step", lambda *_: Sums(np.float32("nan"), np.float32(1), {})
    )
    saved = (
        r"after step 3 the held-out loss is nan.*The checkpoint of step 3 is saved: remove"
        r" .*checkpoints.3 to go on"
    )
    with pytest.raises(NonFiniteError, match=saved):
        train(override(run, {"train.steps": 3}), tmp_path, console=False)
    assert not (tmp_path / "report.json").exists()


# --- choices --------------------------------------------------------------------------------------


def test_likelihoods_that_are_no_numbers_choose_no_option(model, arc, monkeypatch):
    rows = [Example("q", "a", "a", options=("a", "b")), Example("q", "b", "b", options=("a", "b"))]
    monkeypatch.setattr(
        records,
        "option_log_likelihoods",
        lambda *_, **__: [np.asarray([-1.0, np.nan]), np.asarray([-1.0, -2.0])],
    )
    with pytest.raises(NonFiniteError, match="log-likelihoods are NaN or infinite"):
        likelihood_records(model, rows, arc, EVAL)


def test_the_best_checkpoint_has_a_loss(tmp_path):
    with Checkpoints(tmp_path, max_to_keep=3) as checkpoints:
        for step, loss in ((1, float("nan")), (2, 3.0), (3, 2.5)):
            checkpoints.save(step, {"leaf": jax.numpy.zeros(4)}, {"loss": loss})
    with Checkpoints(tmp_path, max_to_keep=3, create=False) as checkpoints:
        assert checkpoints.best == 3


def test_quickstart_needs_what_it_reports():
    """Said when the base is scored, before anything is trained."""
    run = RunConfig()
    quickstart._require_figures(run, {"accuracy": 0.1, "loss": 2.0, "rows": 3})
    with pytest.raises(ConfigError, match=r"gives no accuracy. Set eval.generate and eval.loss"):
        quickstart._require_figures(run, {"loss": 2.0})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fused_model_of_no_numbers_is_not_equal(tmp_path, dtype):
    quickstart._require_equal(1e-6, 1.0, dtype, tmp_path)
    with pytest.raises(ConfigError, match="fused and adapted logits differ by nan"):
        quickstart._require_equal(float("nan"), float("nan"), dtype, tmp_path)
