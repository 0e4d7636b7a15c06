"""Comparisons that several processes share: what another one trains or scores is waited for. And
those that go on with other settings of rounding, memory and speed.
"""

import json
from contextlib import ExitStack
from types import SimpleNamespace

from support.runs import EVAL

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import override
from zflora_jax.experiments import compare, jobs
from zflora_jax.experiments.compare import compare_methods
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.training.lock import locked

LORA = {"lora": AdapterConfig("lora", rank=2)}


def test_a_comparison_waits_for_a_run_that_another_process_trains(
    two_steps, tmp_path, monkeypatch, fake_train
):
    plan = Comparison("busy", two_steps, LORA, (1e-3,), (0,))
    folder = tmp_path / "runs" / "lora-lr0.001-seed0"
    folder.mkdir(parents=True)
    waited = []
    with ExitStack() as stack:
        stack.enter_context(locked(folder))

        def sleep(seconds):
            waited.append(seconds)
            assert not fake_train.runs
            stack.close()  # the other process ends

        monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=sleep))
        result = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert result["rows"][0]["learning rate"] == 1e-3
    assert waited == [jobs.POLL] and len(fake_train.runs) == 1


def test_a_run_that_another_process_scores_is_waited_for(
    two_steps, tmp_path, monkeypatch, fake_train
):
    """Trained, so its lock is free, but not recorded yet: nobody else may score it meanwhile."""
    plan = Comparison("scored", two_steps, LORA, (1e-3,), (0,))
    folder = tmp_path / "runs" / "lora-lr0.001-seed0" / "eval"
    folder.mkdir(parents=True)
    record = tmp_path / "out" / "scored" / "lora-lr0.001-seed0.json"
    with ExitStack() as stack:
        stack.enter_context(locked(folder))

        def sleep(_):
            waited.append(record.exists())
            stack.close()

        waited = []
        monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=sleep))
        compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert waited == [False] and record.is_file()


def test_a_base_that_another_process_scores_is_not_scored_again(
    two_steps, tmp_path, monkeypatch, fake_train
):
    """The runs go on meanwhile, and the base's row comes when it is there."""
    slept = []
    sleep = SimpleNamespace(sleep=lambda _: (slept.append(len(waited)), stack.close()))
    monkeypatch.setattr(compare, "time", sleep)
    plan = Comparison("shared", two_steps, LORA, (1e-3,), (0,), tasks=("arc_easy",), scoring=EVAL)
    folder = tmp_path / "runs" / "base"
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        monkeypatch.setattr(compare, "score", lambda *a: (waited.append(a), jobs.score(*a))[1])
        waited = []
        result = compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
    assert [row["method"] for row in result["rows"]] == ["base", "lora"]
    assert (
        slept == [0] and len(waited) == 1 and len(fake_train.runs) == 2
    )  # its rate, and the run with scores


def test_what_is_finished_keeps_its_rounding(two_steps, tmp_path):
    record = tmp_path / "out" / "kept" / "lora-lr0.001-seed0.json"

    def compared(**settings):
        plan = Comparison("kept", override(two_steps, settings), LORA, (1e-3,), (0,))
        compare_methods(plan, tmp_path / "runs", tmp_path / "out", console=False)
        return json.loads(record.read_text())

    first = compared()
    assert compared(**{"train.remat": "block"}) == first
    record.unlink()  # as after a stop between the last step and the record
    assert compared(**{"train.remat": "block"})["config"] == first["config"]
