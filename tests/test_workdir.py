"""What a run that goes on may change."""

import json

import pytest

from zflora_jax.core.fields import ConfigError, override
from zflora_jax.training import workdir as workdirs
from zflora_jax.training.workdir import adopt


def test_a_longer_run_that_saved_nothing_may_be_taken_back(run, tmp_path, monkeypatch):
    """The state is the end of the shorter run still, as its report says."""
    monkeypatch.setattr(workdirs, "saved_steps", lambda workdir: [8])
    workdirs.claim(tmp_path, adopt(tmp_path, run)[0])
    report = tmp_path / workdirs.REPORT_FILE
    report.write_text(json.dumps({"steps": 8}))
    longer = override(run, {"train.steps": 20})
    workdirs.claim(tmp_path, adopt(tmp_path, longer)[0])
    assert adopt(tmp_path, run)[0].train.steps == run.train.steps
    report.write_text("{")
    with pytest.raises(ConfigError, match=r"train\.steps: 20 there, 8 now"):
        adopt(tmp_path, run)
    report.write_text(json.dumps({"steps": 20}))
    with pytest.raises(ConfigError, match=r"train\.steps: 20 there, 8 now"):
        adopt(tmp_path, run)


def test_files_of_known_tasks_may_move_and_own_ones_not(run, tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, "saved_steps", lambda workdir: [4])
    for task, refused in (("arc_easy", False), ("rows", True)):
        there = override(run, {"data.task": task, "data.data_dir": "old"})
        workdirs.claim(tmp_path / task, adopt(tmp_path / task, there)[0])
        moved = override(there, {"data.data_dir": "new"})
        if refused:
            with pytest.raises(ConfigError, match=r"data.data_dir: 'old' there, 'new' now"):
                adopt(tmp_path / task, moved)
        else:
            assert adopt(tmp_path / task, moved)[0].data.data_dir == "new"


def test_the_best_checkpoint_is_of_the_same_rows(run, tmp_path, monkeypatch):
    """Losses of other rows are not compared with those that are saved."""
    monkeypatch.setattr(workdirs, "saved_steps", lambda workdir: [4])
    best = {"train.keep_best": True, "train.eval_every": 2, "eval.split": "validation"}
    for name, settings, more, words in (
        ("a", {}, {"eval.limit": 2}, ""),
        ("b", best, {"eval.limit": 2}, "eval.limit: 4 there, 2 now"),
        ("c", {}, best, "eval.split: 'test' there, 'validation' now"),
    ):
        there = override(run, settings)
        workdirs.claim(tmp_path / name, adopt(tmp_path / name, there)[0])
        more = override(there, more)
        if words:
            with pytest.raises(ConfigError, match=words):
                adopt(tmp_path / name, more)
        else:
            assert adopt(tmp_path / name, more)[0].eval.limit == 2
