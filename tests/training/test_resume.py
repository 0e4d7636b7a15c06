"""What a resumed run may change and what it keeps: rounding and length, the report of a finished
run, locks that a file system lacks.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path

import pytest
from support.checks import assert_trees_equal
from support.runs import quiet_train

from zflora_jax.core.errors import Preempted
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.reporting.files import plain
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training import lock as locks, workdir as workdirs
from zflora_jax.training.lock import locked
from zflora_jax.training.workdir import adopt, claim, read_config, read_starts


def records(workdir: Path, name: str) -> dict[int, float]:
    return {
        r["step"]: r[name] for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "train"
    }


def evaluations(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl that are evaluations, doubles included."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == "eval"]


def files(workdir: Path) -> dict[str, bytes]:
    """What a run says of itself."""
    return {
        name: (workdir / name).read_bytes()
        for name in ("report.json", "metrics.jsonl", "starts.jsonl")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_dir: str) -> Path:
    """A run of eight steps at a constant rate, for copying."""
    from support.runs import small_run

    workdir = tmp_path_factory.mktemp("finished") / "run"
    quiet_train(override(small_run(base_dir), {"optim.schedule": "constant"}), workdir)
    return workdir


@pytest.fixture
def workdir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- settings that change -------------------------------------------------------------------------


def test_memory_settings_may_change_and_the_data_stays(run, tmp_path, monkeypatch, caplog):
    """What the advice for too little memory names. Losses agree up to rounding, batches to the
    byte.
    """
    run = override(run, {"train.steps": 5})
    whole = quiet_train(run, tmp_path / "whole")
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: step == 3)
    with pytest.raises(Preempted):
        quiet_train(run, tmp_path / "run")
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: False)
    caplog.set_level("INFO", logger="zflora_jax")
    changes = {"train.remat": "block", "train.loss_chunk": 64, "data.grad_accum_steps": 4}
    report = quiet_train(override(run, changes), tmp_path / "run").report
    assert report["resumed_from"] == 3 and report["test_loss"] == pytest.approx(
        whole.report["test_loss"], rel=2e-5
    )
    assert records(tmp_path / "run", "batch_crc32") == records(tmp_path / "whole", "batch_crc32")
    assert records(tmp_path / "run", "loss") == pytest.approx(
        records(tmp_path / "whole", "loss"), rel=2e-5
    )
    for key, (old, new) in {
        "train.remat": ("dots", "block"),
        "train.loss_chunk": (128, 64),
        "data.grad_accum_steps": (2, 4),
    }.items():
        assert (
            f"{key}: {old!r} before, {new!r} from here on. Rounding, memory and speed may change"
            in caplog.text
        )
        assert read_starts(tmp_path / "run")[-1]["changed"][key] == [old, new]
    assert "changed" not in read_starts(tmp_path / "run")[0]
    assert read_config(tmp_path / "run").data.grad_accum_steps == 4


def test_a_finished_run_goes_on_to_more_steps(run, workdir, tmp_path, caplog):
    """At a constant rate it is, bit for bit, the run that was asked for the longer length
    at once.
    """
    run = override(run, {"optim.schedule": "constant", "train.steps": 12})
    caplog.set_level("INFO", logger="zflora_jax")
    longer = quiet_train(run, workdir)
    assert "train.steps: 8 before, 12 from here on. The learning rate is constant" in caplog.text
    assert longer.report["resumed_from"] == 8 and longer.report["steps"] == 12
    assert read_starts(workdir)[-1]["changed"] == {"train.steps": [8, 12]}
    whole = quiet_train(run, tmp_path / "whole")
    assert_trees_equal(longer.adapters, whole.adapters)
    assert records(workdir, "loss") == records(tmp_path / "whole", "loss")
    assert longer.report["test_loss"] == whole.report["test_loss"]
    with pytest.raises(
        ConfigError, match=r"train\.steps: 12 there, 8 now\n  \(12 steps are finished there\)"
    ):
        quiet_train(override(run, {"train.steps": 8}), workdir)


@pytest.mark.parametrize(
    ("schedule", "steps", "words"),
    [("cosine", 12, "follows the cosine schedule of 12 steps"), ("linear", 9, "linear")],
)
def test_another_length_says_what_becomes_of_the_learning_rate(
    run, tmp_path, schedule, steps, words
):
    run = override(run, {"optim.schedule": schedule})
    workdirs.claim(tmp_path, adopt(tmp_path, run)[0])
    adopted, changed = adopt(tmp_path, override(run, {"train.steps": steps, "eval.limit": 3}))
    assert adopted.train.steps == steps and changed == {
        "train.steps": (8, steps),
        "eval.limit": (4, 3),
    }
    [note] = workdirs.change_notes(changed, adopted)
    assert words in note and "eval" not in note


@pytest.mark.parametrize(("schedule", "refused"), [("cosine", True), ("constant", False)])
def test_a_run_is_cut_short_only_at_a_constant_rate(run, tmp_path, monkeypatch, schedule, refused):
    """Elsewhere the learning rate has not come down, as in a run of so many steps."""
    run = override(run, {"optim.schedule": schedule})
    workdirs.claim(tmp_path, adopt(tmp_path, run)[0])
    monkeypatch.setattr(workdirs, "saved_steps", lambda workdir: [4])
    shorter = override(run, {"train.steps": 4})
    if refused:
        with pytest.raises(ConfigError, match=r"train\.steps: 8 there, 4 now\n  \(4 steps are fin"):
            adopt(tmp_path, shorter)
    else:
        assert adopt(tmp_path, shorter)[0].train.steps == 4


def test_what_changes_the_numbers_is_refused_still(run, workdir):
    run = override(
        run,
        {
            "optim.schedule": "constant",
            "train.remat": "block",
            "data.batch_size": 8,
            "train.dtype": "bfloat16",
        },
    )
    with pytest.raises(ConfigError) as error:
        adopt(workdir, run)
    assert (
        "data.batch_size: 4 there, 8 now" in str(error.value)
        and "train.dtype" in str(error.value)
        and "remat" not in str(error.value)
    )


@pytest.mark.parametrize("first", [3, 4], ids=["not saved otherwise", "saved and evaluated"])
def test_a_stop_at_a_step_that_is_due_loses_no_evaluation(run, tmp_path, monkeypatch, first):
    """The stop itself evaluates nothing. The evaluation follows before the next step, once."""
    run = override(run, {"train.steps": 5, "train.eval_every": 1, "eval.split": "validation"})
    quiet_train(run, tmp_path / "whole")
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: step == first)
    with pytest.raises(Preempted):
        quiet_train(run, tmp_path / "run")
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")[: first - 1]
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: False)
    quiet_train(run, tmp_path / "run")
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    assert [r["step"] for r in evaluations(tmp_path / "run")] == [1, 2, 3, 4, 5]


# --- a finished run -------------------------------------------------------------------------------


def test_a_finished_run_keeps_its_report(run, workdir, monkeypatch):
    """Run again elsewhere: commit, device, date and timings are those of the training."""
    run = override(run, {"optim.schedule": "constant"})
    before = files(workdir)
    elsewhere = {
        "commit": "another",
        "date": "2030-01-01T00:00:00+00:00",
        "device": "another",
        "jax": "another",
    }
    monkeypatch.setattr("zflora_jax.experiments.train.environment", lambda: elsewhere)
    monkeypatch.setattr(
        "zflora_jax.experiments.setup.held_out_loss",
        lambda *_, **__: pytest.fail("nothing is to be evaluated"),
    )
    assert quiet_train(
        override(run, {"train.log_every": 3, "eval.max_new_tokens": 5}), workdir
    ).report == json.loads(before["report.json"])
    assert files(workdir) == before


@pytest.mark.parametrize("split", ["validation", "test"])
def test_changed_evaluation_settings_change_the_loss_alone(run, workdir, monkeypatch, split):
    run = override(run, {"optim.schedule": "constant", "eval.limit": 2, "eval.split": split})
    before = json.loads((workdir / "report.json").read_text())
    monkeypatch.setattr("zflora_jax.experiments.train.environment", lambda: {"commit": "another"})
    after = quiet_train(run, workdir).report
    assert after[f"{split}_rows"] == 2 and after[f"{split}_loss"] != before["test_loss"]
    assert after["config"]["eval"]["limit"] == 2
    changed = {f"{split}_rows", f"{split}_loss", "eval_fingerprint", "config"}
    assert {key for key in after if after[key] != before.get(key)} == changed
    assert json.loads((workdir / "report.json").read_text()) == after


@pytest.mark.parametrize("damage", ["missing", "torn", "of fewer steps"])
def test_a_lost_report_is_made_again(run, workdir, monkeypatch, damage):
    run = override(run, {"optim.schedule": "constant"})
    path = workdir / workdirs.REPORT_FILE
    before = json.loads(path.read_text())
    (
        path.unlink()
        if damage == "missing"
        else path.write_text(
            "{" if damage == "torn" else json.dumps(before | {"steps": 4, "test_loss": 9.0})
        )
    )
    monkeypatch.setattr("zflora_jax.experiments.train.environment", lambda: {"commit": "another"})
    after = quiet_train(run, workdir).report
    assert plain(after) == json.loads(path.read_text())
    lost = {
        "resumed_from",
        "load_seconds",
        "data_seconds",
        "first_step_seconds",
        "data_wait_share",
        "seconds",
    }
    assert {key for key in before if before[key] != after.get(key)} <= lost
    assert (
        after["environment"] == before["environment"] and 0 < after["seconds"] <= before["seconds"]
    )


# --- locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, code):
    def refuse(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with locked(tmp_path), locked(tmp_path):
        pass
    [record] = caplog.records
    assert (
        record.levelno == logging.WARNING
        and "no other process can be kept out of it" in record.message
        and str(tmp_path) in record.message
    )


def test_a_run_without_locks_is_trained(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        locks.fcntl,
        "flock",
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "Function not implemented")),
    )
    assert quiet_train(override(run, {"train.steps": 3}), tmp_path).report["steps"] == 3
    assert len([r for r in caplog.records if "kept out" in r.message]) == 1


def test_other_failures_of_a_lock_keep_their_message(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        locks.fcntl,
        "flock",
        lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")),
    )
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path):
        pass
    with pytest.raises(ConfigError, match=r"cannot write to workdir .*Input/output error"):
        workdirs.claim(tmp_path, run)


def test_with_dropout_the_micro_batches_stay(run, tmp_path):
    """What drops out is drawn for each micro-batch, so another number of them is another run."""
    run = override(run, {"adapter.method": "lora", "adapter.dropout": 0.1})
    claim(tmp_path, run)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"data\.grad_accum_steps: 2 there, 4 now"):
        adopt(tmp_path, override(run, {"data.grad_accum_steps": 4}))
    assert adopt(tmp_path, override(run, {"train.remat": True}))[0].train.remat == "block"


def test_a_run_that_saved_nothing_yet_may_change_in_everything(run, tmp_path):
    """As after running out of memory at its first step, when shorter rows or another dtype are
    advised.
    """
    claim(tmp_path, run)
    changed = override(
        run, {"data.bucket_lengths": [128], "train.dtype": "bfloat16", "adapter.rank": 2}
    )
    adopted, changes = adopt(tmp_path, changed)
    assert adopted.adapter.rank == 2 and changes["train.dtype"] == ("float32", "bfloat16")
    claim(tmp_path, adopted)
    assert read_config(tmp_path) == adopted
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"adapter\.rank: 2 there, 4 now"):
        adopt(tmp_path, run)


def test_a_workdir_that_is_taken_meanwhile_is_refused(run, tmp_path, monkeypatch):
    """Between its claim and its lock, by a process that was started at the same moment."""
    real = claim

    def both_claim(workdir, mine):
        real(workdir, mine)
        real(workdir, override(mine, {"adapter.rank": 2}))

    monkeypatch.setattr("zflora_jax.experiments.train.claim", both_claim)
    with pytest.raises(
        ConfigError, match="was taken by a run of another config at the same moment"
    ):
        quiet_train(run, tmp_path / "run")


def test_a_finished_run_keeps_what_its_numbers_were_computed_with(run, workdir):
    before = read_config(workdir)
    run = override(
        before,
        {
            "train.matmul_precision": "highest",
            "train.loss_chunk": 64,
            "data.grad_accum_steps": 4,
            "eval.limit": 3,
        },
    )
    quiet_train(run, workdir)
    after = read_config(workdir)
    assert after == override(before, {"eval.limit": 3})
