"""How commands end that do not finish, what they leave, and what their tables show."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import pytest
from safetensors import SafetensorError

from zflora_jax.cli import export, generate
from zflora_jax.cli.main import main
from zflora_jax.cli.output import print_table, silence
from zflora_jax.cli.stopping import terminated
from zflora_jax.core.errors import CheckpointError
from zflora_jax.experiments import export as exporting
from zflora_jax.hf import directory
from zflora_jax.hf.directory import folder_beside, whole_directory
from zflora_jax.training import workdir


def test_sigterm_of_connected_processes_and_in_threads_is_left_alone(monkeypatch):
    before, found = signal.getsignal(signal.SIGTERM), []

    def inside():
        with terminated():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    inside()
    assert found == [before, before] and signal.getsignal(signal.SIGTERM) is before


def test_an_export_that_is_ended_leaves_nothing_beside_its_target(tmp_path, monkeypatch):
    """As a scheduler ends a job that is writing."""

    def ended(_: Any, out: str, **__: Any) -> None:
        with directory_at(Path(out)) as staging:
            (staging / "half").write_bytes(b"x")
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("SIGTERM had no effect")

    monkeypatch.setattr(exporting, "export_run", ended)
    monkeypatch.setattr(workdir, "read_config", lambda _: None)
    monkeypatch.setattr(export, "mesh_asked", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main(["export", "--workdir", "runs/a", "--out", str(tmp_path / "out")])
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before and not list(tmp_path.iterdir())


def directory_at(target: Path) -> Any:
    return whole_directory(target, lambda _: None, "sign")


@pytest.mark.parametrize("opened", [folder_beside, directory_at])
def test_what_a_killed_export_left_is_named(opened, tmp_path, caplog):
    left = tmp_path / ".out[1].abcdefgh.tmp"
    for name in (left.name, ".out[1].gguf.abcdefgh.tmp", ".out[1]2.abcdefgh.tmp"):
        (tmp_path / name).mkdir()  # the others are of other targets
    target = tmp_path / "out[1]"
    with opened(target):
        pass
    [said] = caplog.messages
    assert said.startswith(f"{left}: left by an export to this place")
    assert said.endswith(f"if {target} is missing, rename the one that ends in .old to it.")
    assert left.is_dir()  # it may be of one that runs


@pytest.mark.parametrize("told", ["", "9 requested and 6 written", "I/O error (os error 27)"])
def test_a_full_disk_names_the_export(told, tmp_path):
    said = pytest.raises(CheckpointError, match=r"out could not be written: .*Free space on that")
    with said, directory_at(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise SafetensorError(told) if told else OSError(errno.ENOSPC, "No space")
    assert not list(tmp_path.iterdir())


def test_a_replacement_that_is_ended_leaves_nothing_of_the_old_export(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    remove, asked = shutil.rmtree, []

    def ended(path, **given):
        asked.append(path)
        if len(asked) == 1:
            raise SystemExit(143)
        remove(path, **given)

    monkeypatch.setattr(directory.shutil, "rmtree", ended)
    with (
        pytest.raises(SystemExit),
        whole_directory(tmp_path / "out", lambda _: {"old"}, "sign") as staging,
    ):
        (staging / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_ctrl_c_ends_a_command_by_the_signal_without_a_traceback():
    """A shell goes on with its loop after a command that exits, whatever the code."""
    program = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "from zflora_jax.cli import export\n"
        "from zflora_jax.cli.main import main\n"
        "export.run = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(['export', '--workdir', 'runs/a', '--out', 'x']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_no_memory_on_the_device_is_no_bug(monkeypatch, capsys):
    """It says what takes less; another error of XLA is shown whole."""

    def failing(_: object) -> None:
        raise jax.errors.JaxRuntimeError(error)

    monkeypatch.setattr(generate, "run", failing)
    error = "RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore"
    assert main(["generate", "--model", "tiny", "--prompt", "a"]) == 2
    said = capsys.readouterr().err
    assert "Out of memory allocating 8 bytes. To use less" in said and "more\n" not in said
    for error in ("INTERNAL: a bug", "RESOURCE_EXHAUSTED: a message is too large"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=error):
            main(["generate", "--model", "tiny", "--prompt", "a"])


def test_runs_models_and_adapters_in_each_others_place(base_dir, tmp_path, refused):
    """All three have a config.json, or nearly."""
    run, lora = tmp_path / "run", tmp_path / "lora"
    for folder in (run, lora):
        folder.mkdir()
    (run / "config.json").write_text('{"adapter": {}, "train": {}, "data": {}}')
    (lora / "adapter_config.json").write_text("{}")
    for wrong, words in {
        ("--model", run): "settings of a training run, not a model: give its directory with",
        ("--workdir", base_dir): "holds a model, not a training run. Give the --workdir",
        ("--model", lora): "It holds a PEFT adapter: give its base with --model",
    }.items():
        assert words in refused("generate", "--prompt", "a", *wrong)


def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path, refused, monkeypatch):
    """The model, which is missing here, is looked at afterwards."""
    file, run = tmp_path / "file", tmp_path / "run"
    file.write_text("mine")
    run.mkdir()
    for command, out in (
        ("eval --model missing --tasks arithmetic", file),
        ("init", file / "x.py"),
    ):
        assert "file is no directory" in refused(*command.split(), "--out", out)
    for out in (run, "."):
        said = refused("plan", "--config", "quickstart", "--out", out)
        assert "is a directory; give the name of a file" in said
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is no directory that you may" in refused("init", "--out", run / "x.py")
    assert file.read_text() == "mine" and not [*run.iterdir()]


def test_libtpu_is_silenced_where_no_tpu_is(monkeypatch):
    for found, kept in (([], True), (["/dev/accel0"], False)):
        monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
        monkeypatch.setattr("glob.glob", lambda _, found=found: found)
        silence()
        assert ("TPU_ACCELERATOR_TYPE" in os.environ) == kept


def test_a_table_shows_all_of_what_it_is_given(capsys, monkeypatch):
    """What is in square brackets is no markup of rich, and long values go on in the next line."""
    monkeypatch.setenv("COLUMNS", "60")
    long = "0123456789" * 10
    print_table({"targets": "[qv]", "why": "cannot read [/data/x]", "print": long}, "in [runs]")
    shown = capsys.readouterr().out
    assert "[qv]" in shown and "[/data/x]" in shown and "in [runs]" in shown
    assert "".join(c for c in shown if c.isdigit()) == long
