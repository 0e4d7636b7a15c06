"""What a run that goes on may change."""

import json

import pytest

from zflora_jax.core.fields import ConfigError, override
from zflora_jax.training import workdir as workdirs
from zflora_jax.training.workdir import adopt, require_no_jump


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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_longer_run_is_not_made_of_one_whose_rate_came_down(schedule, run, tmp_path):
    """As a sweep asks for it; at a constant rate it is the same run."""
    steps = run.train.steps
    longer = override(run, {"train.steps": steps + 4, "optim.schedule": schedule})
    require_no_jump(tmp_path, longer)  # nothing is there
    workdirs.claim(tmp_path, run)
    require_no_jump(tmp_path, longer)  # no step is saved
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    for fewer in (steps, steps - 1):
        require_no_jump(tmp_path, override(longer, {"train.steps": fewer}))
    if schedule == "constant":
        require_no_jump(tmp_path, longer)
        return
    with pytest.raises(ConfigError, match=rf"a run of {steps} steps, of which 2 .* at step 2\."):
        require_no_jump(tmp_path, longer)


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


def test_a_finished_run_is_there_on_a_mesh_that_does_not_divide_its_micro_batches(run, tmp_path):
    """Nothing is left to train, so how the batch was divided does not matter."""
    run = override(run, {"data.batch_size": 4, "data.grad_accum_steps": 4})
    workdirs.claim(tmp_path, run)
    (tmp_path / "checkpoints" / str(run.train.steps)).mkdir(parents=True)
    wide = override(run, {"data.grad_accum_steps": 1, "mesh.data": 4, "train.loss_chunk": 64})
    found, changed = adopt(tmp_path, wide)
    assert changed.keys() == {"mesh.data", "data.grad_accum_steps"}
    assert (found.mesh.data, found.data.grad_accum_steps) == (4, 1)
    assert found.train.loss_chunk == run.train.loss_chunk
    assert adopt(tmp_path, override(wide, {"mesh.data": 1}))[0].data.grad_accum_steps == 4
    dropping = override(run, {"adapter.method": "lora", "adapter.dropout": 0.1})
    workdirs.claim(tmp_path / "b", dropping)
    (tmp_path / "b" / "checkpoints" / str(run.train.steps)).mkdir(parents=True)
    assert adopt(tmp_path / "b", override(dropping, {"data.grad_accum_steps": 1}))
