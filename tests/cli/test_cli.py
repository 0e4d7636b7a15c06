"""The commands, in process: help is complete, and every wrong input ends with exit code 2 and a
message that says what to change, no traceback.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from zflora_jax.cli.main import COMMANDS, _parser, main


def subcommands() -> dict[str, argparse.ArgumentParser]:
    return next(a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))


# --- help -----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["train", "eval"])
def test_the_usage_of_a_script_is_what_works(name, capsys):
    with pytest.raises(SystemExit):
        main(["--help"], command=name)
    assert capsys.readouterr().out.startswith(f"usage: {name}.py [-h] ")


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
        (
            ["export", "--workdir", "a", "--out", "b", "--dtype", "float64"],
            "invalid choice: 'float64'",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_command_is_named_after_its_module():
    assert list(subcommands()) == [c.__name__.removeprefix("zflora_jax.cli.") for c in COMMANDS]


# --- config files ---------------------------------------------------------------------------------


def test_missing_config_file_names_the_nearest(refused, config_file, tmp_path):
    near = Path(config_file).with_name("confg.py")
    assert f"config file {near} does not exist. did you mean {config_file!r}?" in refused(
        "train", "--config", near, "--workdir", tmp_path / "w"
    )
    message = refused("train", "--config", tmp_path / "none" / "c.py", "--workdir", tmp_path / "w")
    assert "does not exist. Give the path of a Python file." in message
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "has no function get_config()"),
        (
            "def get_config():\n    return {}\n",
            "returns dict; it must return a zflora_jax.RunConfig",
        ),
        ("def get_config(:\n", "SyntaxError"),
        ("import zflora_jaxx\n", "line 1: ModuleNotFoundError: No module named 'zflora_jaxx'"),
        ("def get_config():\n\n    return undefined\n", "line 3: NameError"),
        (
            (
                "from zflora_jax import AdapterConfig\ndef get_config():\n    return"
                " AdapterConfig('lora', rnk=3)\n"
            ),
            (
                "line 3: unknown key 'rnk' of AdapterConfig: did you mean 'rank'? Allowed: alpha,"
                " alpha_pattern, dropout, extra_head_dim"
            ),
        ),
        (
            (
                "from zflora_jax import AdapterConfig\ndef get_config():\n    return"
                " AdapterConfig('lora', rank=0)\n"
            ),
            "adapter.rank=0: must be at least 1",
        ),
    ],
    ids=["no function", "another type", "syntax", "import", "name", "unknown key", "value"],
)
def test_wrong_config_files(text, message, refused, tmp_path):
    (tmp_path / "c.py").write_text(text)
    assert message in refused("train", "--config", tmp_path / "c.py", "--workdir", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_config_that_is_no_python_file(refused, tmp_path):
    (tmp_path / "c.yaml").write_text("model: tiny\n")
    assert "is not a Python file; give a .py file" in refused(
        "train", "--config", tmp_path / "c.yaml", "--workdir", tmp_path / "w"
    )


def test_sweep_files_are_checked_too(refused, config_file, tmp_path):
    assert "has no function get_sweep()" in refused(
        "sweep", "--config", config_file, "--workdir", tmp_path / "w"
    )
    (tmp_path / "s.py").write_text("def get_sweep():\n    return 3\n")
    assert "returns int; it must return a zf.Grid" in refused(
        "sweep", "--config", tmp_path / "s.py", "--workdir", tmp_path / "w"
    )
    assert not (tmp_path / "w").exists()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("adapter.rnk=4", "unknown key 'rnk' of AdapterConfig: did you mean 'rank'?"),
        ("trian.steps=4", "unknown key 'trian.steps' of RunConfig: did you mean 'train'?"),
        ("train.steps", "--set 'train.steps': expected KEY=VALUE, e.g. train.steps=50."),
        ("=5", "unknown key '' of RunConfig"),
        ("train.steps=", "train.steps='': expected int"),
        ("train.steps=lots", "train.steps='lots': expected int, got str"),
        ("optim.learning_rate=inf", "optim.learning_rate=inf: expected a finite number."),
        ("mesh.fsdp=all", "mesh.fsdp='all': expected int, got str."),
        ("train.dtype=float64", "train.dtype='float64': did you mean"),
        ("train.dtype=float16", "Allowed: bfloat16, float32"),
        ("adapter.rank=0", "adapter.rank=0: must be at least 1"),
        (
            "adapter.extra_head_dim=8",
            "method 'zflora-minimal' does not widen the heads stream; leave extra_head_dim unset",
        ),
        (
            "adapter.method=zflora-mini",
            "unknown adapter method 'zflora-mini': did you mean 'zflora-minimal'?",
        ),
        (
            "data.grad_accum_steps=3",
            "data.batch_size=2 is not a multiple of data.grad_accum_steps=3",
        ),
        (
            "data.bucket_lengths=long",
            "data.bucket_lengths='long': expected a list of int, written as [long].",
        ),
        (
            "data.bucket_lengths=128,64",
            "data.bucket_lengths=[128, 64]: expected increasing positive lengths",
        ),
        (
            "optim.warmup_steps=2",
            "optim.warmup_steps=2 does not leave a step at full rate in train.steps=2",
        ),
    ],
)
def test_wrong_settings(change, message, refused, config_file, tmp_path):
    assert message in refused(
        "train", "--config", config_file, "--workdir", tmp_path / "w", "--set", change
    )
    assert not (tmp_path / "w").exists()


def test_odd_head_rank(refused, config_file, tmp_path):
    changes = ("adapter.method=zflora-uniform", "adapter.extra_head_dim=7")
    message = refused(
        "train", "--config", config_file, "--workdir", tmp_path / "w", "--set", *changes
    )
    assert "adapter.extra_head_dim=7 is odd" in message and "use an even width" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model=nowhere/at/all"], "no model at 'nowhere/at/all'"),
        (
            ["data.bucket_lengths=320,512"],
            (
                "data.bucket_lengths goes up to 512, beyond the model's context of 400; leave out"
                " lengths above it."
            ),
        ),
        (
            ["data.bucket_lengths=[16]"],
            "examples are longer than the longest of data.bucket_lengths=[16]",
        ),
        (["data.task=aritmetic"], "unknown task 'aritmetic': did you mean 'arithmetic'?"),
        (["data.task=rows"], "data.data_dir is not set"),
        (["data.task=rows", "data.data_dir=not-here"], "data.data_dir='not-here' does not exist"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_settings_that_do_not_fit_the_model_or_the_data(
    changes, message, refused, config_file, tmp_path
):
    assert message in refused(
        "train", "--config", config_file, "--workdir", tmp_path / "w", "--set", *changes
    )
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["adapter.targets=q_proj"],
            "adapter.targets='q_proj' matches no kernel; kernels are q, k, v, o, gate, up, down",
        ),
        (["adapter.targets=q|("], "is not a valid regex"),
        (["adapter.targets=q|k|v"], "leaves method 'zflora-minimal' nothing to widen"),
    ],
    ids=["matches nothing", "no regex", "nothing to widen"],
)
def test_targets_are_refused_and_the_workdir_stays_free(
    changes, message, refused, config_file, tmp_path
):
    """A refused start must not claim the directory: the corrected command would be told that
    another config lives there.
    """
    assert message in refused(
        "train", "--config", config_file, "--workdir", tmp_path / "w", "--set", *changes
    )
    assert not (tmp_path / "w" / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "text"), [("train.jsonl", ""), ("train.json", "[]"), ("train.jsonl", "\n\n")]
)
def test_empty_dataset(name, text, refused, config_file, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(text)
    changes = ("data.task=rows", f"data.data_dir={tmp_path / 'data'}")
    message = refused(
        "train", "--config", config_file, "--workdir", tmp_path / "w", "--set", *changes
    )
    assert (
        f"{name}: no rows. Expected a JSON list of objects, or one JSON object per line." in message
    )
    assert not (tmp_path / "w").exists()


# --- model directories ----------------------------------------------------------------------------


def test_missing_model_directory(refused, tmp_path):
    assert f"no model at '{tmp_path / 'none'}'" in refused("eval", "--model", tmp_path / "none")
    assert "no preset; did you mean 'smollm2-135m'?" in refused("eval", "--model", "smollm2-135")


def test_empty_model_directory(refused, tmp_path):
    assert "has no config.json; expected a Hugging Face model directory." in refused(
        "eval", "--model", tmp_path
    )


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999], ids=str)
def test_truncated_safetensors(keep, refused, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    message = refused("eval", "--model", tmp_path / "m")
    assert (
        "model.safetensors is not a readable safetensors file" in message
        and "truncated or damaged. Download or export it again." in message
    )


def without_tokenizer(model_dir: Path, target: Path) -> Path:
    return shutil.copytree(
        model_dir,
        target,
        ignore=shutil.ignore_patterns(
            "tokenizer*", "special_tokens*", "chat_template*", "vocab.json"
        ),
    )


def test_model_directory_without_a_tokenizer(refused, model_dir, config_file, tmp_path):
    message = refused(
        "train",
        "--config",
        config_file,
        "--workdir",
        tmp_path / "w",
        "--set",
        f"model={without_tokenizer(model_dir, tmp_path / 'm')}",
    )
    assert (
        "comes without a tokenizer" in message
        and "add its tokenizer files to the directory" in message
    )
    assert "comes without a tokenizer" in refused("eval", "--model", tmp_path / "m")


def test_prompts_longer_than_the_context(refused, model_dir, tmp_path):
    changes = (
        "data.bucket_lengths=[320]",
        "data.batch_size=2",
        "eval.limit=2",
        "eval.max_new_tokens=380",
    )
    message = refused("eval", "--model", model_dir, "--out", tmp_path / "out", "--set", *changes)
    assert (
        "with eval.max_new_tokens=380 that exceeds the model's context of 400. Shorten or remove"
        " it, or lower eval.max_new_tokens."
        in message
        and "arithmetic, test, row 1 has " in message
    )
