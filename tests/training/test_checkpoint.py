"""Checkpoints: what is saved is what comes back, the right ones are kept, and damage is named with
its remedy.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from support.runs import quiet_train, saved_state

from zflora_jax.core import trees
from zflora_jax.core.errors import Preempted
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.restore import load_run
from zflora_jax.experiments.train import _first_state
from zflora_jax.parallel import distributed
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.training.checkpoint import Checkpoints, SaveError
from zflora_jax.training.trainer import fresh_state


def test_a_step_is_saved_before_it_is_evaluated(run, tmp_path, monkeypatch):
    """Evaluation may take long, and cannot be interrupted."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zflora_jax.experiments.setup.held_out_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            quiet_train(override(run, {"train.save_every": None}), tmp_path)
    assert quiet_train(run, tmp_path).report["resumed_from"] == run.train.steps


def test_a_damaged_checkpoint_names_the_remedy(run, tmp_path):
    quiet_train(run, tmp_path)
    for file in (tmp_path / "checkpoints" / "8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"checkpoints/8 cannot be read.*Remove that folder to go on from step 6"
    ):
        quiet_train(run, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    assert quiet_train(run, tmp_path).report["resumed_from"] == 6


def test_the_newest_and_the_best_checkpoints_are_kept(run, tmp_path, monkeypatch):
    run = override(
        run,
        {
            "train.steps": "12",
            "train.eval_every": "2",
            "train.max_to_keep": "1",
            "eval.split": "validation",
        },
    )
    with pytest.raises(
        ConfigError, match=r"train.keep_best=True needs the loss of every checkpoint"
    ):
        override(run, {"train.keep_best": "True", "train.eval_every": "None"})
    with pytest.raises(ConfigError, match=r"set eval.split=validation"):
        override(run, {"train.keep_best": "True", "eval.split": "test"})
    run = override(run, {"train.keep_best": "True"})
    losses = iter([3.0, 2.0, 1.0, 2.0, 1.5, 1.2])
    monkeypatch.setattr(
        "zflora_jax.experiments.setup.held_out_loss",
        lambda *_, **__: {"loss": next(losses), "tokens": 1.0, "rows": 1.0},
    )
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: step == 9)
    with pytest.raises(Preempted):  # another process goes on with it
        quiet_train(run, tmp_path)
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: False)
    quiet_train(run, tmp_path)
    best = 6
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [best, 12]
    assert (
        load_run(tmp_path)[3] == 12
        and load_run(tmp_path, "best")[3] == best == load_run(tmp_path, str(best))[3]
    )
    with pytest.raises(
        ConfigError, match=rf"has no checkpoint of step 3; it has those of {best}, 12"
    ):
        load_run(tmp_path, 3)
    with pytest.raises(ConfigError, match="expected a number of steps, or 'best'"):
        load_run(tmp_path, "newest")


def test_without_losses_there_is_no_best(run, tmp_path):
    quiet_train(override(run, {"train.steps": "4"}), tmp_path)
    with pytest.raises(
        ConfigError, match=r"has no best checkpoint: train with train.keep_best=True"
    ):
        load_run(tmp_path, "best")


def test_a_checkpoint_whose_numbers_have_changed_is_refused(run, tmp_path):
    quiet_train(run, tmp_path)
    meta = tmp_path / "checkpoints" / "8" / "meta" / "metadata"
    text = meta.read_text()
    checksum = json.loads(text)["state_checksum"]
    meta.write_text(text.replace(checksum, checksum[::-1]))
    with pytest.raises(
        ConfigError,
        match=r"its numbers are not those that were saved.*Remove that folder to go on from step 6",
    ):
        quiet_train(run, tmp_path)
    # As earlier versions saved it: a fingerprint taken on the host.
    meta.write_text(text)
    leaves = saved_state(run, tmp_path)
    earlier = {key: value for key, value in json.loads(text).items() if key != "state_checksum"}
    meta.write_text(json.dumps(earlier | {"state_fingerprint": trees.fingerprint(leaves)}))
    assert load_run(tmp_path)[3] == 8
    meta.write_text(json.dumps(earlier | {"state_fingerprint": trees.fingerprint(leaves)[::-1]}))
    with pytest.raises(ConfigError, match="its numbers are not those that were saved"):
        load_run(tmp_path)


def test_what_is_saved_is_the_state_of_its_step(run, tmp_path):
    """Whatever is written into its buffers, which a step donates, while the checkpoint is on its
    way to the disk.
    """
    model = load_base(run)
    state = jax.jit(lambda: fresh_state(run, model))()
    wanted = jax.device_get(state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(overwrite(state))
    found = saved_state(run, tmp_path)
    for have, want in zip(found.values(), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(have, want)


def test_a_save_that_fails_says_so_and_keeps_the_rest(run, tmp_path, monkeypatch):
    quiet_train(override(run, {"train.steps": "4"}), tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"steps": 4', '"steps": 8'))
    monkeypatch.setattr(
        "orbax.checkpoint.CheckpointManager.save",
        lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(
        SaveError, match=r"No space left on device.*The checkpoints before it are whole"
    ):
        quiet_train(run, tmp_path)
    monkeypatch.undo()
    assert quiet_train(run, tmp_path).report["resumed_from"] == 4


def test_runs_side_by_side_save_at_one_time(tmp_path):
    """As a parallel sweep's do. orbax alone mixes up their directories, or waits five minutes for
    one that comes under another name.
    """

    def saved(name: int) -> int | None:
        with Checkpoints(tmp_path / str(name), max_to_keep=2) as checkpoints:
            for step in range(1, 16):
                checkpoints.save(
                    step, {"leaf": jax.numpy.full((4,), step, np.float32)}, {"step": step}
                )
        with Checkpoints(tmp_path / str(name), create=False) as checkpoints:
            state, meta = checkpoints.restore({"leaf": jax.ShapeDtypeStruct((4,), np.float32)})
        return meta["step"] if (np.asarray(state["leaf"]) == 15).all() else None

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(saved, range(6))) == [15] * 6


def test_a_lock_ends_although_a_child_has_its_file_open(tmp_path):
    """As a child that another thread is starting has, between fork and exec."""
    code = """
import os, sys, time
from zflora_jax.training.lock import locked
with locked(sys.argv[1]):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
try:
    with locked(sys.argv[1]):
        print("free")
finally:
    os.kill(child, 9)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "free\n", done.stderr


@pytest.mark.parametrize("of_process_0", [2, None])
def test_the_newest_checkpoint_is_that_of_process_0(of_process_0, monkeypatch, tmp_path):
    """A network file system can show another host one more, or one less."""
    monkeypatch.setattr(distributed, "from_process_0", lambda value: of_process_0)
    asked: list[int] = []
    prints = {"base_fingerprint": "", "data_fingerprint": ""}

    def restore(_, step):
        asked.append(step)
        return SimpleNamespace(step=step), prints | {"seconds": 1.5}

    setup: Any = SimpleNamespace(
        fresh_state=lambda: "fresh",
        state_like=lambda: None,
        fingerprints=prints,
        run=RunConfig(),
    )
    there: Any = SimpleNamespace(latest=4, restore=restore)
    state, seconds = _first_state(setup, there, tmp_path)
    if of_process_0 is None:
        assert (state, seconds, asked) == ("fresh", 0.0, [])
    else:
        assert (state.step, seconds, asked) == (2, 1.5, [2])
