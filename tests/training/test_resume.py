"""What a resumed run may change and keeps: rounding, length, files; a finished run's report."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from support.checks import assert_trees_equal
from support.runs import claim, mark_saved, quiet_train, small_run

from zflora_jax import ConfigError, Preempted, held_out, load_run, override
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.reporting.files import plain
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training import workdir as workdirs
from zflora_jax.training.workdir import adopt, claimed, read_config, read_starts


def records(workdir: Path, name: str) -> dict[int, float]:
    found = read_metrics(workdir / "metrics.jsonl")
    return {r["step"]: r[name] for r in found if r["split"] == "train"}


def evaluations(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl that are evaluations, doubles included."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == "eval"]


def files(workdir: Path) -> dict[str, bytes]:
    """What a run says of itself."""
    names = ("report.json", "metrics.jsonl", "starts.jsonl")
    return {name: (workdir / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base_dir: str) -> Path:
    """A run of eight steps at a constant rate, for copying."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    quiet_train(override(small_run(base_dir), {"optim.schedule": "constant"}), workdir)
    return workdir


@pytest.fixture
def workdir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- settings that change -------------------------------------------------------------------------


@pytest.mark.soak  # a long run
def test_memory_settings_may_change_and_the_data_stays(run, tmp_path, monkeypatch, caplog):
    """Losses agree up to rounding, batches to the byte."""
    run = override(run, {"train.steps": 5})
    whole = quiet_train(run, tmp_path / "whole")
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: step == 3)
    with pytest.raises(Preempted):
        quiet_train(run, tmp_path / "run")
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: False)
    caplog.set_level("INFO", logger="zflora_jax")
    changes = {"train.remat": "block", "train.loss_chunk": 64, "data.grad_accum_steps": 4}
    report = quiet_train(override(run, changes), tmp_path / "run").report
    assert report["resumed_from"] == 3
    assert report["test_loss"] == pytest.approx(whole.report["test_loss"], rel=2e-5)
    found, wanted = (tmp_path / name for name in ("run", "whole"))
    assert records(found, "batch_crc32") == records(wanted, "batch_crc32")
    assert records(found, "loss") == pytest.approx(records(wanted, "loss"), rel=2e-5)
    for key, old in zip(changes, ("dots", 128, 2), strict=True):
        assert f"{key}: {old!r} before, {changes[key]!r} from here on" in caplog.text
        assert read_starts(tmp_path / "run")[-1]["changed"][key] == [old, changes[key]]
    assert "changed" not in read_starts(tmp_path / "run")[0]
    assert read_config(tmp_path / "run").data.grad_accum_steps == 4


def test_a_finished_run_goes_on_to_more_steps(run, workdir, tmp_path, caplog):
    """At a constant rate it is, bit for bit, the run that was asked for the longer length at once.
    Epochs of 40 rows in steps of 4 are counted once the rows are there, and recorded.
    """
    whole = override(run, {"optim.schedule": "constant", "train.steps": 12})
    run = override(whole, {"train.epochs": 1.2})
    caplog.set_level("INFO", logger="zflora_jax")
    longer = quiet_train(run, workdir)
    assert "train.steps: 8 before, 12 from here on" in caplog.text
    assert longer.report["resumed_from"] == 8 and longer.report["steps"] == 12
    changed = {"train.steps": [8, 12], "train.epochs": [None, 1.2]}
    assert read_starts(workdir)[-1]["changed"] == changed
    assert read_config(workdir).steps == 12 and longer.report["epochs"] == 1.2
    assert quiet_train(run, workdir).report == longer.report
    whole = quiet_train(whole, tmp_path / "whole")
    assert_trees_equal(longer.adapters, whole.adapters)
    assert records(workdir, "loss") == records(tmp_path / "whole", "loss")
    assert longer.report["test_loss"] == whole.report["test_loss"]
    said = r"train\.steps: 12 there, 8 now\n  \(12 of 12 steps are finished there\.\)"
    with pytest.raises(ConfigError, match=said):
        quiet_train(override(run, {"train.steps": 8}), workdir)


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


def test_a_finished_run_keeps_its_report(run, workdir, monkeypatch, caplog):
    """Run again elsewhere: commit, device, date and timings are those of the training."""
    run = override(run, {"optim.schedule": "constant"})
    before = files(workdir)
    elsewhere = dict.fromkeys(("commit", "date", "device", "jax"), "another")
    monkeypatch.setattr("zflora_jax.experiments.train.environment", lambda: elsewhere)
    evaluated = lambda *_, **__: pytest.fail("nothing is to be evaluated")  # noqa: E731
    monkeypatch.setattr("zflora_jax.experiments.setup.held_out_loss", evaluated)
    free = {"train.log_every": 3, "eval.max_new_tokens": 5}
    rounding = {"train.matmul_precision": "highest", "data.grad_accum_steps": 4}
    there = read_config(workdir)
    caplog.set_level("INFO", logger="zflora_jax")
    again = quiet_train(override(run, free | rounding), workdir)
    assert again.report == json.loads(before["report.json"]) and "is finished" in caplog.text
    assert_trees_equal(again.adapters, load_run(workdir)[2])
    assert files(workdir) == before and read_config(workdir) == override(there, free)


def test_changed_evaluation_settings_change_the_loss_alone(run, workdir, monkeypatch):
    changes = {"eval.limit": 2, "eval.split": "validation"}
    run = override(run, {"optim.schedule": "constant"} | changes)
    before = json.loads((workdir / "report.json").read_text())
    monkeypatch.setattr("zflora_jax.experiments.train.environment", lambda: {"commit": "another"})
    after = quiet_train(run, workdir).report
    assert after["validation_rows"] == 2 and after["validation_loss"] != before["test_loss"]
    changed = {"validation_rows", "validation_loss", "eval_fingerprint", "config"}
    assert {key for key in after if after[key] != before.get(key)} == changed
    assert json.loads((workdir / "report.json").read_text()) == after


@pytest.mark.parametrize("damage", ["torn", "of fewer steps"])
def test_a_lost_report_is_made_again(run, workdir, monkeypatch, damage):
    run = override(run, {"optim.schedule": "constant"})
    path = workdir / workdirs.REPORT_FILE
    before = json.loads(path.read_text())
    path.write_text("{" if damage == "torn" else json.dumps(before | {"steps": 4, "test_loss": 9}))
    monkeypatch.setattr("zflora_jax.experiments.train.environment", lambda: {"commit": "another"})
    after = quiet_train(run, workdir).report
    assert plain(after) == json.loads(path.read_text())
    lost = {"resumed_from", "seconds", "spent_seconds", "goodput"}
    lost |= {f"{x}_seconds" for x in ("load", "data", "first_step")}
    assert {key for key in before if before[key] != after.get(key)} <= lost
    assert after["environment"] == before["environment"]
    assert 0 < after["seconds"] <= before["seconds"]


# --- what a run that goes on may change ---------------------------------------------------------


BEST = {"train.keep_best": True, "train.eval_every": 2, "eval.split": "validation"}
DROPOUT = {"adapter.method": "lora", "adapter.dropout": 0.1}
OWN_ROWS = {"data.task": "rows", "data.data_dir": "old"}


@pytest.mark.parametrize(
    ("there", "now", "message"),
    [
        ({}, {"train.steps": 12}, None),
        ({}, {"adapter.rank": 2}, r"adapter\.rank: 4 there, 2 now"),
        ({}, {"train.dtype": "bfloat16"}, r"train\.dtype: 'float32' there, 'bfloat16' now"),
        # What drops out is drawn for each micro-batch.
        (DROPOUT, {"data.grad_accum_steps": 4}, r"data\.grad_accum_steps: 2 there, 4 now"),
        (DROPOUT, {"train.remat": "block"}, None),
        # Elsewhere the learning rate has not come down, as in a run of so many steps.
        ({"optim.schedule": "constant"}, {"train.steps": 4}, None),
        ({}, {"train.steps": 4}, r"train\.steps: 8 there, 4 now\n  \(4 of 8 steps "),
        # The place of a known task's files says nothing about its rows.
        (OWN_ROWS | {"data.task": "arc_easy"}, {"data.data_dir": "new"}, None),
        (OWN_ROWS, {"data.data_dir": "new"}, r"data\.data_dir: 'old' there, 'new' now"),
        # Losses of other rows are not compared with those that are saved.
        ({}, {"eval.limit": 2}, None),
        (BEST, {"eval.limit": 2}, r"eval\.limit: 4 there, 2 now"),
        ({}, BEST, r"eval\.split: 'test' there, 'validation' now"),
    ],
)
def test_changes_once_a_step_is_saved(run, tmp_path, there, now, message):
    there = override(run, there)
    claim(tmp_path, adopt(tmp_path, there)[0])
    mark_saved(tmp_path, 4)
    if message is None:
        adopted, changed = adopt(tmp_path, override(there, now))
        assert changed.keys() == now.keys() and adopted == override(read_config(tmp_path), now)
    else:
        with pytest.raises(ConfigError, match=message):
            adopt(tmp_path, override(there, now))


def test_losses_of_other_rows_choose_no_best(run, tmp_path, monkeypatch):
    run = override(run, BEST | {"optim.schedule": "constant", "train.steps": 4})
    quiet_train(run, tmp_path / "run")
    monkeypatch.setattr("zflora_jax.experiments.setup.held_out", partial(held_out, split="train"))
    with pytest.raises(ConfigError, match=r"run measured its best checkpoint on other"):
        quiet_train(override(run, {"train.steps": 6}), tmp_path / "run")


def test_a_run_that_saved_nothing_yet_may_change_in_everything(run, tmp_path):
    """As after running out of memory at its first step, when shorter rows are advised."""
    claim(tmp_path, run)
    other = {"data.bucket_lengths": [128], "train.dtype": "bfloat16", "adapter.rank": 2}
    adopted, changes = adopt(tmp_path, override(run, other))
    assert adopted.adapter.rank == 2 and changes["train.dtype"] == ("float32", "bfloat16")


def test_files_without_a_config_are_refused_and_a_lock_alone_is_not(run, tmp_path):
    claim(tmp_path, run)
    (tmp_path / "config.json").unlink()
    assert adopt(tmp_path, run)[1] == {} and [x.name for x in tmp_path.iterdir()] == [".lock"]
    for name in ("metrics.jsonl", "report.json", "starts.jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=f"has .*{name} but no config.json"):
            adopt(tmp_path, run)
    with pytest.raises(ConfigError, match=r"workdir .*starts.jsonl is no directory that you may"):
        adopt(tmp_path / name, run)


def test_a_workdir_that_is_taken_meanwhile_is_refused(run, tmp_path, monkeypatch):
    """Between its checks and its lock, by a process that was started at the same moment."""

    def late(workdir, mine):
        claim(workdir, override(mine, {"adapter.rank": 2}))
        mark_saved(workdir, 2)
        return claimed(workdir, mine)

    monkeypatch.setattr("zflora_jax.experiments.train.claimed", late)
    with pytest.raises(ConfigError, match=r"adapter\.rank: 2 there, 4 now"):
        quiet_train(run, tmp_path / "run")


def test_a_finished_run_is_there_on_a_mesh_that_does_not_divide_its_micro_batches(run, tmp_path):
    """Nothing is left to train, so how the batch was divided does not matter."""
    run = override(run, {"data.batch_size": 4, "data.grad_accum_steps": 4} | DROPOUT)
    claim(tmp_path, run)
    mark_saved(tmp_path, run.train.steps)
    wide = override(run, {"data.grad_accum_steps": 1, "mesh.data": 4, "train.loss_chunk": 64})
    found, changed = adopt(tmp_path, wide)
    assert changed.keys() == {"mesh.data", "data.grad_accum_steps"}
    assert (found.mesh.data, found.data.grad_accum_steps) == (4, 1)
    assert found.train.loss_chunk == run.train.loss_chunk
    assert adopt(tmp_path, override(wide, {"mesh.data": 1}))[0].data.grad_accum_steps == 4
