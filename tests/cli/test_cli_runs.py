"""The commands on runs that are there: what they print and write, and what they refuse."""

import argparse
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from support.runs import choice

from zflora_jax import DataConfig, Preempted, RunConfig, override
from zflora_jax.cli import train
from zflora_jax.cli.eval import _model, _trained_on
from zflora_jax.cli.main import _parser, main
from zflora_jax.data import mixture
from zflora_jax.training.workdir import read_starts


@pytest.mark.parametrize("argv", [("eval",), ("export", "--out", "out")], ids=lambda v: v[0])
def test_workdir_without_a_run(argv, refused, trained_dir, tmp_path):
    for path in (tmp_path / "none", tmp_path):
        message = refused(*argv, "--workdir", path)
        assert (
            f"{path} holds no run (no config.json in it). Give the --workdir of a training run, or"
            " --model for a model directory." in message
        )
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in refused(*argv, "--workdir", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "expected a table of RunConfig fields" in refused(*argv, "--workdir", tmp_path)
    shutil.copy(Path(trained_dir) / "config.json", tmp_path / "config.json")
    assert "has no checkpoint yet; train it first." in refused(*argv, "--workdir", tmp_path)


def test_workdir_of_another_config(refused, config_file, trained_dir):
    before = (Path(trained_dir) / "config.json").read_text()
    given = ("--config", config_file, "--workdir", trained_dir)
    message = refused("train", *given, "--set", "adapter.rank=5", "optim.learning_rate=0.5")
    assert f"{trained_dir} holds a run with another config:" in message
    assert "adapter.rank: 4 there, 5 now" in message
    assert "optim.learning_rate: 0.001 there, 0.5 now" in message
    assert "Use another --workdir, or the same settings to resume it." in message
    assert (Path(trained_dir) / "config.json").read_text() == before


def test_export_into_a_directory_of_somebody_else(refused, trained_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    given = ("--workdir", trained_dir, "--out", tmp_path)
    message = refused("export", *given, "--checkpoint", "999")  # before it loads: there is no 999
    assert "was not written by this project. It is left as it is: choose another path" in message
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--tasks arithmetik", "unknown task 'arithmetik': did you mean 'arithmetic'?"),
        ("--set eval.split=train", "split='train': "),
        ("--set adapter.rank=5", "--set adapter.rank: an evaluation cannot change how a run"),
    ],
)
def test_wrong_evaluations(argv, message, refused, trained_dir):
    assert message in refused("eval", "--workdir", trained_dir, *argv.split())


def test_evaluations_of_models_that_are_wrong(refused, model_dir, tmp_path):
    message = refused("eval", "--model", model_dir, "--tasks", "arc_easy", "--data-dir", tmp_path)
    for words in ("ARC-Easy", "test.json", "AGI-Edgerunners/LLM-Adapters", "--data-dir"):
        assert words in message
    # Said before a model is looked for.
    message = refused("eval", "--model", tmp_path / "none", "--tasks", "arc_eazy")
    assert "did you mean 'arc_easy'?" in message
    message = refused("eval", "--model", model_dir, "--checkpoint", "8")
    assert "--checkpoint chooses a saved step of a run: give its --workdir." in message


# --- what works says so ---------------------------------------------------------------------------


def run(*argv: object) -> None:
    assert main([str(word) for word in argv]) == 0


def test_eval_and_export_print_a_table_and_write_files(trained_dir, tmp_path, capsys):
    run("eval", "--workdir", trained_dir, "--limit", 1, "--out", tmp_path / "eval")
    out = capsys.readouterr().out
    assert "accuracy" in out and "loss" in out
    result = json.loads((tmp_path / "eval" / "arithmetic-test-step2.json").read_text())
    assert result["rows"] == result["config"]["eval"]["limit"] == 1
    export = ("export", "--workdir", trained_dir, "--out", tmp_path / "out")
    run(*export, "--dtype", "float32", "--eps", 0.125)
    assert json.loads((tmp_path / "out" / "zflora.json").read_text())["eps_z"] == 0.125
    assert "top1_agreement" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    changes = ("--set", "data.bucket_lengths=[320]", "eval.generate=False")
    again = ("--limit", 1, "--out", tmp_path / "e", *changes)
    run("eval", "--model", tmp_path / "out", *again)
    again = json.loads((tmp_path / "e" / "arithmetic-test-out.json").read_text())
    np.testing.assert_allclose(again["loss"], result["loss"], rtol=1e-5)


def test_eval_of_tasks_marks_what_was_trained_on(model_dir, tmp_path):
    """Also the rows that this project would hold out of the file, and those behind a limit."""
    rows = [choice(i, "answer1") for i in range(40)]
    (tmp_path / "ARC-Easy").mkdir()
    for name, some in (("train", rows[:30]), ("test", rows[:32])):
        (tmp_path / "ARC-Easy" / f"{name}.json").write_text(json.dumps(some))
    argv = ["eval", "--model", model_dir, "--tasks", "arc_easy", "--data-dir", tmp_path]
    argv += ["--out", tmp_path / "e", "--trained-on", "arc_easy"]
    argv += ["--set", "data.bucket_lengths=[320]", "eval.generate=False", "eval.loss=False"]
    run(*argv, "data.train_limit=5")
    result = json.loads((tmp_path / "e" / "arc_easy-test-model.json").read_text())
    assert (result["rows"], result["clean_rows"]) == (32, 2)
    assert "| arc_easy | clean | 2 |" in (tmp_path / "e" / "summary-test-model.md").read_text()


def test_own_data_of_instructions_and_outputs_alone_is_trained_on_and_evaluated(
    config_file, tmp_path, capsys
):
    """Rows without `answer` have a loss and answers to read, but no accuracy."""
    rows = [{"instruction": f"Name {i}", "output": f"A: it is {i}"} for i in range(30)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    own = ["--set", "data.task=rows", f"data.data_dir={tmp_path}"]
    run = ["--config", config_file, "--workdir", str(tmp_path / "run")]
    assert main(["train", *run, *own]) == 0
    assert "plain_texts" not in read_starts(tmp_path / "run")[-1]
    assert main(["eval", "--workdir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "test_loss" in said and "answer: A: it is " in said  # some answers to read
    assert re.search(r"step 2/2  loss .*lr .*norm .*epoch 0\.50  .*/s \(.* target tokens\)", said)
    [result] = (tmp_path / "run" / "eval").glob("rows-test-step2.json")
    result = json.loads(result.read_text())
    assert np.isfinite(result["loss"]) and "accuracy" not in result
    record = json.loads(
        (tmp_path / "run" / "eval" / "rows-test-step2.jsonl").read_text("utf-8").split("\n")[0]
    )
    assert record["output"] is not None and record["answer"].startswith("A: it is ")


def test_a_stopped_run_ends_with_its_code_whatever_signal_comes_next(monkeypatch, capsys):
    def stopped(_: object) -> None:
        raise Preempted("stopped by a signal after step 3")

    monkeypatch.setattr(train, "run", stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["train", "--workdir", "none"]) == 75
        assert (
            signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            and "after step 3" in capsys.readouterr().err
        )
    finally:
        signal.signal(signal.SIGTERM, before)


def test_resume_needs_a_run_and_train_needs_a_config(refused, tmp_path):
    assert "train needs --config FILE, or --resume" in refused("train", "--workdir", tmp_path / "a")
    assert "holds no run (no config.json in it)" in refused(
        "train", "--resume", "--workdir", tmp_path / "a"
    )
    assert "holds no run to resume. Leave out --resume" in refused(
        "train", "--config", "configs/quickstart.py", "--resume", "--workdir", tmp_path / "a"
    )
    assert not (tmp_path / "a").exists()


def test_a_run_on_a_named_dataset_is_compared_with_that(monkeypatch):
    """Also where the tasks lie in a folder."""
    looked = []
    monkeypatch.setattr(mixture, "source_splits", looked.append)
    base = RunConfig(data=DataConfig("rows", data_dir="hub:owner/name"))
    config = override(base, {"data.data_dir": "elsewhere"})
    args = argparse.Namespace(trained_on=None, workdir="runs/a")
    (found,) = _trained_on(args, base, config)
    assert found.data.data_dir == "hub:owner/name" and looked == [found.data]


def test_a_model_in_the_directory_of_the_caller_has_its_name(model_dir, monkeypatch):
    monkeypatch.chdir(model_dir)
    args = _parser().parse_args(["eval", "--model", "."])
    assert _model(args, RunConfig(), None)[1] == Path(model_dir).name
