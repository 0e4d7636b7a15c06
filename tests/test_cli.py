"""The commands, in process: help is complete, and every wrong input ends with exit code 2 and a message that says what to change, no traceback."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model

from zflora_jax import commands
from zflora_jax.cli import _parser, main
from zflora_jax.hf.save import save_hf
from zflora_jax.hosts import Stopped

CONFIG = """
from zflora_jax.config import AdapterConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig

def get_config():
    return RunConfig(
        model={model!r},
        adapter=AdapterConfig("zflora-minimal", rank=4),
        data=DataConfig(batch_size=2, lengths=(320,), train_limit=8),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=2, loss_chunk=128),
        eval=EvalConfig(limit=2, batch_size=2, max_new_tokens=4),
    )
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Prepared data goes to a directory of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZFLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(num_layers=1, max_position_embeddings=400)
    model.tokenizer = byte_tokenizer()
    path = tmp_path_factory.mktemp("base") / "model"
    save_hf(path, model)
    return path


@pytest.fixture(scope="module")
def config(model_dir: Path) -> str:
    path = model_dir.parent / "config.py"
    path.write_text(CONFIG.format(model=str(model_dir)))
    return str(path)


@pytest.fixture(scope="module")
def workdir(config: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of two steps."""
    path = str(tmp_path_factory.mktemp("run") / "a")
    assert main(["train", "--config", config, "--workdir", path]) == 0
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must be refused; returns the message."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        captured = capsys.readouterr()
        message = captured.err[captured.err.index("error: ") :]
        assert "Traceback" not in captured.err and captured.out == ""
        assert len(message) > 20 and message.rstrip()[-1] in ".)", message
        return message

    return run


def subcommands() -> dict[str, argparse.ArgumentParser]:
    return next(a.choices for a in _parser("zflora")._actions if isinstance(a, argparse._SubParsersAction))


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", subcommands())
def test_help_is_complete(name, capsys):
    """Every command says what it does, every option of it what it is for."""
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: zflora {name}" in text
    parser = subcommands()[name]
    assert parser.description and len(parser.description) > 20
    for action in parser._actions:
        assert action.help, f"{name} {action.option_strings} has no help"
        assert all(option in text for option in action.option_strings)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in text for name in subcommands())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--config", "x"], "the following arguments are required: --workdir"),
        (["eval"], "one of the arguments --workdir --model is required"),
        (["eval", "--workdir", "a", "--model", "b"], "not allowed with argument"),
        (["eval", "--model", "b", "--limit", "few"], "invalid int value: 'few'"),
        (["export", "--workdir", "a", "--out", "b", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["export", "--workdir", "a", "--out", "b", "--dtype", "float64"], "invalid choice: 'float64'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


# --- config files -------------------------------------------------------------------------------------------------


def test_missing_config_file_names_the_nearest(refused, config, tmp_path):
    near = Path(config).with_name("confg.py")
    assert f"config file {near} does not exist. did you mean {config!r}?" in refused("train", "--config", near, "--workdir", tmp_path / "w")
    message = refused("train", "--config", tmp_path / "none" / "c.py", "--workdir", tmp_path / "w")
    assert "does not exist. Give the path of a Python file." in message
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no function get_config()"),
        ("def get_config():\n    return {}\n", "returns dict; it must return a zflora_jax.RunConfig"),
        ("def get_config(:\n", "SyntaxError"),
        ("import zflora_jaxx\n", "line 1: ModuleNotFoundError: No module named 'zflora_jaxx'"),
        ("def get_config():\n\n    return undefined\n", "line 3: NameError"),
        (
            "from zflora_jax import AdapterConfig\ndef get_config():\n    return AdapterConfig('lora', rnk=3)\n",
            "line 3: unknown key 'rnk' of AdapterConfig: did you mean 'rank'? Allowed: alpha, dropout, head_rank",
        ),
        ("from zflora_jax import AdapterConfig\ndef get_config():\n    return AdapterConfig('lora', rank=0)\n", "adapter.rank=0: must be at least 1"),
    ],
    ids=["no function", "another type", "syntax", "import", "name", "unknown key", "value"],
)
def test_wrong_config_files(text, message, refused, tmp_path):
    (tmp_path / "c.py").write_text(text)
    assert message in refused("train", "--config", tmp_path / "c.py", "--workdir", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_config_that_is_no_python_file(refused, tmp_path):
    (tmp_path / "c.yaml").write_text("model: tiny\n")
    assert "is not a Python file; give a .py file" in refused("train", "--config", tmp_path / "c.yaml", "--workdir", tmp_path / "w")


def test_sweep_files_are_checked_too(refused, config, tmp_path):
    assert "has no function get_sweep()" in refused("sweep", "--config", config, "--workdir", tmp_path / "w")
    (tmp_path / "s.py").write_text("def get_sweep():\n    return 3\n")
    assert "returns int; it must return a zflora_jax.Grid or Comparison" in refused(
        "sweep", "--config", tmp_path / "s.py", "--workdir", tmp_path / "w"
    )
    several = ("sweep", "--config", "configs/accuracy_table.py", "--workdir", tmp_path / "w")
    assert "did you mean 'accuracy_math'?" in refused(*several, "--only", "accuracy_maths")
    assert not (tmp_path / "w").exists()


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adapter.rnk=4", "unknown key 'rnk' of AdapterConfig: did you mean 'rank'?"),
        ("trian.steps=4", "unknown key 'trian.steps' of RunConfig: did you mean 'train'?"),
        ("train.steps", "--set 'train.steps': expected KEY=VALUE, e.g. train.steps=50."),
        ("=5", "unknown key '' of RunConfig"),
        ("train.steps=", "steps='': expected int"),
        ("train.steps=lots", "steps='lots': expected int, got str"),
        ("train.dtype=float64", "dtype='float64': did you mean"),
        ("train.dtype=float16", "Allowed: bfloat16, float32"),
        ("adapter.rank=0", "adapter.rank=0: must be at least 1"),
        ("adapter.head_rank=8", "method 'zflora-minimal' does not widen the heads stream; leave head_rank unset"),
        ("adapter.method=zflora-mini", "unknown adapter method 'zflora-mini': did you mean 'zflora-minimal'?"),
        ("data.accumulate=3", "data.batch_size=2 is not a multiple of data.accumulate=3"),
        ("data.lengths=128", "lengths=128: expected a list of int, written as [128]."),
        ("data.lengths=128,64", "data.lengths=[128, 64]: expected increasing positive lengths"),
        ("optim.warmup_steps=2", "optim.warmup_steps=2 does not leave a step at full rate in train.steps=2"),
    ],
)
def test_wrong_settings(change, message, refused, config, tmp_path):
    assert message in refused("train", "--config", config, "--workdir", tmp_path / "w", "--set", change)
    assert not (tmp_path / "w").exists()


def test_odd_head_rank(refused, config, tmp_path):
    changes = ("adapter.method=zflora-uniform", "adapter.head_rank=7")
    message = refused("train", "--config", config, "--workdir", tmp_path / "w", "--set", *changes)
    assert "adapter.head_rank=7 is odd" in message and "use an even width" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model=nowhere/at/all"], "no model at 'nowhere/at/all'"),
        (["data.lengths=320,512"], "data.lengths goes up to 512, beyond the model's context of 400; leave out lengths above it."),
        (["data.lengths=[16]"], "examples are longer than the longest of data.lengths=[16]"),
        (["data.task=aritmetic"], "unknown task 'aritmetic': did you mean 'arithmetic'?"),
        (["data.task=json"], "data.data_dir is not set"),
        (["data.task=json", "data.data_dir=not-here"], "data.data_dir='not-here' does not exist"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_settings_that_do_not_fit_the_model_or_the_data(changes, message, refused, config, tmp_path):
    assert message in refused("train", "--config", config, "--workdir", tmp_path / "w", "--set", *changes)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["adapter.targets=q_proj"], "adapter.targets='q_proj' matches no kernel; kernels are q, k, v, o, gate, up, down"),
        (["adapter.targets=q|("], "is not a valid regex"),
        (["adapter.targets=q|k|v"], "leaves method 'zflora-minimal' nothing to widen"),
    ],
    ids=["matches nothing", "no regex", "nothing to widen"],
)
def test_targets_are_refused_and_the_workdir_stays_free(changes, message, refused, config, tmp_path):
    """A refused start must not claim the directory: the corrected command would be told that another config lives there."""
    assert message in refused("train", "--config", config, "--workdir", tmp_path / "w", "--set", *changes)
    assert not (tmp_path / "w" / "config.json").exists()


@pytest.mark.parametrize(("name", "text"), [("train.jsonl", ""), ("train.json", "[]"), ("train.jsonl", "\n\n")])
def test_empty_dataset(name, text, refused, config, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(text)
    changes = ("data.task=json", f"data.data_dir={tmp_path / 'data'}")
    message = refused("train", "--config", config, "--workdir", tmp_path / "w", "--set", *changes)
    assert f"{name}: no rows. Expected a JSON list of objects, or one JSON object per line." in message
    assert not (tmp_path / "w").exists()


# --- model directories --------------------------------------------------------------------------------------------


def test_missing_model_directory(refused, tmp_path):
    assert f"no model at '{tmp_path / 'none'}'" in refused("eval", "--model", tmp_path / "none")
    assert "no preset; did you mean 'smollm2-135m'?" in refused("eval", "--model", "smollm2-135")


def test_empty_model_directory(refused, tmp_path):
    assert "has no config.json; expected a Hugging Face model directory." in refused("eval", "--model", tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999], ids=str)
def test_truncated_safetensors(keep, refused, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    message = refused("eval", "--model", tmp_path / "m")
    assert "model.safetensors is not a readable safetensors file" in message and "truncated or damaged. Download or export it again." in message


def without_tokenizer(model_dir: Path, target: Path) -> Path:
    return shutil.copytree(model_dir, target, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "chat_template*", "vocab.json"))


def test_model_directory_without_a_tokenizer(refused, model_dir, config, tmp_path):
    message = refused("train", "--config", config, "--workdir", tmp_path / "w", "--set", f"model={without_tokenizer(model_dir, tmp_path / 'm')}")
    assert "comes without a tokenizer" in message and "add its tokenizer files to the directory" in message


def test_prompts_longer_than_the_context(refused, model_dir, tmp_path):
    changes = ("data.lengths=[320]", "data.batch_size=2", "eval.limit=2", "eval.max_new_tokens=380")
    message = refused("eval", "--model", model_dir, "--out", tmp_path / "out", "--set", *changes)
    assert "with max_new_tokens=380 that exceeds the model's context of 400. Shorten the prompt or lower max_new_tokens." in message


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [("eval",), ("export", "--out", "out")], ids=lambda v: v[0])
def test_workdir_without_a_run(argv, refused, tmp_path):
    for path in (tmp_path / "none", tmp_path):
        message = refused(*argv, "--workdir", path)
        assert f"{path} holds no run (no config.json in it). Give the --workdir of a training run, or --model for a model directory." in message
    (tmp_path / "config.json").write_text("{")
    assert "is not valid JSON" in refused(*argv, "--workdir", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "expected a table of RunConfig fields" in refused(*argv, "--workdir", tmp_path)


def test_workdir_of_a_run_that_saved_nothing_yet(refused, workdir, tmp_path):
    shutil.copy(Path(workdir) / "config.json", tmp_path / "config.json")
    assert "has no checkpoint yet; train it first." in refused("eval", "--workdir", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert "has no complete checkpoint yet; train it first." in refused("eval", "--workdir", tmp_path)


def test_workdir_of_another_config(refused, config, workdir):
    before = (Path(workdir) / "config.json").read_text()
    message = refused("train", "--config", config, "--workdir", workdir, "--set", "adapter.rank=5", "optim.learning_rate=0.5")
    assert f"{workdir} holds a run with another config:" in message
    assert "adapter.rank: 4 there, 5 now" in message and "optim.learning_rate: 0.001 there, 0.5 now" in message
    assert "Use another --workdir, or the same settings to resume it." in message
    assert (Path(workdir) / "config.json").read_text() == before


def test_peft_export_of_another_method(refused, workdir, tmp_path):
    message = refused("export", "--workdir", workdir, "--out", tmp_path / "out", "--format", "peft")
    assert "method 'zflora-minimal' has no PEFT form" in message and "use save_hf" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "words"), [(["--eps", "0.1"], "power of two"), (["--eps", "0.25", "--format", "peft"], "--eps goes with --format hf")]
)
def test_scales_of_the_state_that_cannot_be_used(refused, workdir, tmp_path, extra, words):
    assert words in refused("export", "--workdir", workdir, "--out", tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


def test_export_into_a_directory_of_somebody_else(refused, workdir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    message = refused("export", "--workdir", workdir, "--out", tmp_path)
    assert "was not written by this project. It is left as it is: choose another path, or move it away." in message
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--tasks", "arithmetik"), "unknown task 'arithmetik': did you mean 'arithmetic'?"),
        (("--limit", "0"), "eval.limit=0: must be at least 1, or None for all examples"),
        (("--set", "eval.split=train"), "split='train': "),
        (("--set", "adapter.rank=5"), "--set adapter.rank: what a run has trained cannot be changed when it is evaluated; eval.*, data.* and"),
        (("--set", "eval.splt=test"), "unknown key 'splt' of EvalConfig: did you mean 'split'?"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_wrong_evaluations(argv, message, refused, workdir):
    assert message in refused("eval", "--workdir", workdir, *argv)


def test_a_missing_task_file_is_named_with_where_to_get_it(refused, model_dir, tmp_path):
    message = refused("eval", "--model", model_dir, "--tasks", "arc_easy", "--data-dir", tmp_path)
    assert "ARC-Easy" in message and "test.json" in message and "AGI-Edgerunners/LLM-Adapters" in message and "--data-dir" in message
    assert "did you mean 'arc_easy'?" in refused("eval", "--model", tmp_path / "none", "--tasks", "arc_eazy")  # said before a model is looked for
    assert "comes without a tokenizer" in refused("eval", "--model", without_tokenizer(model_dir, tmp_path / "m"))


# --- what works says so -------------------------------------------------------------------------------------------


def test_eval_and_export_print_a_table_and_write_files(workdir, tmp_path, capsys):
    assert main(["eval", "--workdir", workdir, "--limit", "1", "--out", str(tmp_path / "eval")]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and "loss" in out
    result = json.loads((tmp_path / "eval" / "arithmetic-test-step2.json").read_text())
    assert result["rows"] == 1 and np.isfinite(result["loss"]) and result["config"]["eval"]["limit"] == 1

    assert main(["export", "--workdir", workdir, "--out", str(tmp_path / "out"), "--dtype", "float32", "--eps", "0.125"]) == 0
    assert json.loads((tmp_path / "out" / "zflora.json").read_text())["eps_z"] == 0.125
    assert "top1_agreement" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    changes = ["data.lengths=[320]", "data.batch_size=2", "eval.generate=False"]
    assert main(["eval", "--model", str(tmp_path / "out"), "--limit", "1", "--out", str(tmp_path / "e"), "--set", *changes]) == 0
    again = json.loads((tmp_path / "e" / "arithmetic-test-out.json").read_text())
    np.testing.assert_allclose(again["loss"], result["loss"], rtol=1e-5)


def test_eval_of_tasks_marks_what_was_trained_on(model_dir, tmp_path, capsys):
    rows = [
        {"instruction": f"{i}?\n\nAnswer format: answer1/answer2", "input": "", "output": "the correct answer is answer1", "answer": "answer1"}
        for i in range(40)
    ]
    (tmp_path / "ARC-Easy").mkdir()
    for name, some in (("train", rows[:30]), ("test", rows[:32])):
        (tmp_path / "ARC-Easy" / f"{name}.json").write_text(json.dumps(some))
    changes = ["data.lengths=[320]", "data.batch_size=2", "eval.generate=False", "eval.loss=False"]
    argv = ["eval", "--model", str(model_dir), "--tasks", "arc_easy", "--data-dir", str(tmp_path), "--out", str(tmp_path / "e"), "--set", *changes]
    assert main([*argv, "--trained-on", "arc_easy"]) == 0  # also the rows that this project would hold out of the file
    assert "likelihood_sum_clean" in capsys.readouterr().out
    result = json.loads((tmp_path / "e" / "arc_easy-test-model.json").read_text())
    assert (result["rows"], result["clean_rows"]) == (32, 2)
    assert "| arc_easy | clean | 2 |" in (tmp_path / "e" / "summary-test-model.md").read_text()


def test_own_data_of_instructions_and_outputs_alone_is_trained_on_and_evaluated(
    config, tmp_path, capsys
):
    """What docs/howto.md says: no `answer`. There is a loss, and there are answers to read, but
    no accuracy."""
    rows = [{"instruction": f"Name {i}", "output": f"A: it is {i}"} for i in range(30)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    own = ["--set", "data.task=json", f"data.data_dir={tmp_path}"]
    run = ["--config", config, "--workdir", str(tmp_path / "run")]
    assert main(["train", *run, *own]) == 0
    assert main(["eval", "--workdir", str(tmp_path / "run")]) == 0
    assert "test_loss" in capsys.readouterr().out
    [result] = (tmp_path / "run" / "eval").glob("json-test-step2.json")
    result = json.loads(result.read_text())
    assert np.isfinite(result["loss"]) and "accuracy" not in result
    record = json.loads((tmp_path / "run" / "eval" / "json-test-step2.jsonl").read_text("utf-8").split("\n")[0])
    assert record["output"] is not None and record["answer"].startswith("A: it is ")


def test_a_stopped_run_ends_with_its_code_whatever_signal_comes_next(monkeypatch, capsys):
    def stopped(_: object) -> None:
        raise Stopped("stopped by a signal after step 3")

    monkeypatch.setattr(commands, "train", stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["train", "--workdir", "none"]) == 75
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN and "after step 3" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


def test_resume_needs_a_run_and_train_needs_a_config(refused, tmp_path):
    assert "train needs --config FILE, or --resume" in refused("train", "--workdir", tmp_path / "a")
    assert "holds no run (no config.json in it)" in refused("train", "--resume", "--workdir", tmp_path / "a")
    assert "holds no run to resume. Leave out --resume" in refused(
        "train", "--config", "configs/quickstart.py", "--resume", "--workdir", tmp_path / "a"
    )
    assert not (tmp_path / "a").exists()
