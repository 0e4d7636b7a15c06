"""The commands, in process: help is complete, and every wrong input ends with exit code 2 and a
message that says what to change, no traceback.
"""

import argparse
import shutil
from pathlib import Path

import pytest

from zflora_jax.cli.main import _parser, main


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


def test_a_wrong_command_or_option_names_what_was_meant(capsys):
    wrong = {"trian": "'trian': did you mean 'train'?", "eval --model m --lr=1": "`optim.learning_"}
    wrong["generate --model m"] = "one of the arguments --prompt --file is required"
    for argv, said in wrong.items():
        with pytest.raises(SystemExit):
            main(argv.split())
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted({*subcommands()} - {"bench"}))
def test_an_empty_value_is_not_an_absent_one(name, refused):
    parser = subcommands()[name]
    groups = [g._group_actions for g in parser._mutually_exclusive_groups if g.required]
    texts = [a for a in parser._actions if a.nargs != 0 and not a.choices and a.type in (None, str)]
    for action in (a for a in texts if a.dest not in ("prompt", "system")):
        others = [a for a in texts if a.required] + [g[-1] for g in groups if action not in g]
        given = [word for a in others if a is not action for word in (*a.option_strings[:1], "x")]
        message = refused(name, *given, *action.option_strings[:1], "")
        assert f"{action.dest.replace('_', '-')} is empty" in message


# --- config files ---------------------------------------------------------------------------------


@pytest.fixture
def no_run(refused, config_file, tmp_path):
    """Runs `zflora train` that must be refused before anything is written; returns the message."""

    def run(*changes: str, config: object = config_file) -> str:
        more = ("--set", *changes) if changes else ()
        message = refused("train", "--config", config, "--workdir", tmp_path / "w", *more)
        assert not (tmp_path / "w").exists()
        return message

    return run


def test_missing_config_file_names_the_nearest(no_run, config_file, tmp_path):
    near = Path(config_file).with_name("confg.py")
    message = f"config file {near} does not exist. did you mean {config_file!r}?"
    assert message in no_run(config=near)
    message = "does not exist. Allowed: chat, dpo, quickstart."  # those that come with the package
    assert message in no_run(config=tmp_path / "none" / "c.py")
    assert f"config file {tmp_path} is a directory. " in no_run(config=tmp_path)


def test_init_writes_a_config_that_is_not_there(refused, tmp_path):
    assert main(["init", "--out", str(tmp_path / "own.py")]) == 0
    assert "def get_config" in (tmp_path / "own.py").read_text()
    assert "own.py exists: edit it" in refused("init", "--out", tmp_path / "own.py")
    assert "did you mean 'chat'" in refused("init", "chad", "--out", tmp_path / "new.py")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.py", "x = 1\n", "has no function get_config()"),
        ("c.py", "def get_config():\n    return {}\n", "must return a zflora_jax.RunConfig"),
        ("c.py", "def get_config(:\n", "SyntaxError"),
        ("c.py", "import zflora_jaxx\n", "line 1: ModuleNotFoundError: No module named"),
        ("c.py", "def get_config():\n\n    return undefined\n", "line 3: NameError"),
        (
            "c.py",
            "from zflora_jax import AdapterConfig\nAdapterConfig('lora', rank=0)\n",
            "line 2: adapter.rank=0: must be at least 1",
        ),
        ("c.yaml", "model: tiny\n", "is not a Python file; give a .py file"),
    ],
)
def test_wrong_config_files(name, text, message, no_run, tmp_path):
    (tmp_path / name).write_text(text)
    assert message in no_run(config=tmp_path / name)


def test_sweep_files_are_checked_too(refused, config_file, tmp_path):
    given = ("--workdir", tmp_path / "w")
    message = refused("sweep", "--config", config_file, *given)
    assert "has no function get_sweep()" in message
    (tmp_path / "s.py").write_text("def get_sweep():\n    return 3\n")
    message = refused("sweep", "--config", tmp_path / "s.py", *given)
    assert "returns int; it must return (RunConfig, settings)" in message
    assert not (tmp_path / "w").exists()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("train.steps", "--set 'train.steps': expected KEY=VALUE, e.g. train.steps=50."),
        ("model=nowhere/at/all", "no model at 'nowhere/at/all'"),
        ("data.bucket_lengths=320,512", "goes up to 512, beyond the model's context of 400"),
        ("data.bucket_lengths=[16]", "examples are longer than data.bucket_lengths=[16]"),
        ("data.task=aritmetic", "unknown task 'aritmetic': did you mean 'arithmetic'?"),
        ("data.task=rows", "data.data_dir=None is not set"),
        ("data.task=rows data.data_dir=not-here", "data.data_dir='not-here' does not exist"),
        ("optim.optimizer=adam", "'adam': did you mean 'adamw'? Allowed: adafactor, "),
        ("train.report_to=tensorboard,wandbb", "to[1]='wandbb': did you mean 'wandb'? All"),
        ("adapter.targets=q_proj", "Matching is on the full name. Here that is 'q'."),
    ],
)
def test_wrong_settings(changes, message, no_run):
    """A refused start must not claim the directory: the corrected command would be told that
    another config lives there.
    """
    assert message in no_run(*changes.split(" "))


# --- model directories ----------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_and_prompts_that_are_too_long(
    refused, no_run, model_dir, tmp_path
):
    files = ("tokenizer*", "special_tokens*", "chat_template*", "vocab.json")
    shutil.copytree(model_dir, tmp_path / "m", ignore=shutil.ignore_patterns(*files))
    message = no_run(f"model={tmp_path / 'm'}")
    assert "comes without a tokenizer" in message and "add its tokenizer files" in message
    assert "comes without a tokenizer" in refused("eval", "--model", tmp_path / "m")
    changes = ("data.bucket_lengths=[320]", "eval.limit=2", "eval.max_new_tokens=380")
    message = refused("eval", "--model", model_dir, "--out", tmp_path / "out", "--set", *changes)
    assert "arithmetic, test, row 1 has " in message
    assert "with eval.max_new_tokens=380 that exceeds the model's context of 400." in message
