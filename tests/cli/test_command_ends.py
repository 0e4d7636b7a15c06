"""How commands end that do not finish, what they leave, and what their tables show."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.exports import WIDENED, fused_model

from zflora_jax.cli import export, generate
from zflora_jax.cli.main import main
from zflora_jax.cli.output import print_table
from zflora_jax.cli.stopping import terminated
from zflora_jax.core import trees
from zflora_jax.core.model import Model
from zflora_jax.experiments import export as exporting
from zflora_jax.hf import directory
from zflora_jax.hf.directory import folder_beside, whole_directory
from zflora_jax.hf.keys import hf_table
from zflora_jax.hf.restore import load_stock
from zflora_jax.hf.save import save_hf
from zflora_jax.hf.shards import Shards
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
        with whole_directory(Path(out), lambda _: None, "sign") as staging:
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


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_a_killed_export_left_is_named(kind, tmp_path, monkeypatch):
    left = tmp_path / ".out[1].abcdefgh.tmp"
    left.mkdir()
    for other in (".out[1].gguf.abcdefgh.tmp", ".out[1]2.abcdefgh.tmp"):  # of other targets
        (tmp_path / other).mkdir()
    said: list[str] = []
    monkeypatch.setattr(directory.log, "warning", lambda text, *of: said.append(text % of))
    target = tmp_path / "out[1]"
    opened = (
        folder_beside(target) if kind == "file" else whole_directory(target, lambda _: None, "sign")
    )
    with opened:
        pass
    assert len(said) == 1 and said[0].startswith(f"{left}: of an export to this place")
    assert said[0].endswith("delete them.") and left.is_dir()  # it may be of one that runs
    target.rmdir() if target.exists() else None
    left.rename(left.with_suffix(".old"))  # the only whole copy, where a replacement was cut short
    with whole_directory(target, lambda _: None, "sign"):
        pass
    assert said[1].endswith(f"is the export that was there: rename it to {target}.")


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
        "from zflora_jax.cli import info\n"
        "from zflora_jax.cli.main import main\n"
        "info.run = lambda _: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(['info', 'runs/a']))"
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
    assert "Out of memory allocating 8 bytes. What takes less" in said and "more\n" not in said
    for error in ("INTERNAL: a bug", "RESOURCE_EXHAUSTED: a message is too large"):
        with pytest.raises(jax.errors.JaxRuntimeError, match=error):
            main(["generate", "--model", "tiny", "--prompt", "a"])


def test_runs_models_and_adapters_in_each_others_place(base_dir, run_dir, tmp_path, capsys):
    """All three have a config.json, or nearly."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    asks = ["generate", "--prompt", "a"]
    for wrong, words in {
        ("--model", run_dir): "settings of a training run, not a model: give its directory with",
        ("--workdir", base_dir): "holds a model, not a training run: give it with --model",
        ("--model", str(tmp_path / "lora")): "It holds a PEFT adapter: give its base with --model",
    }.items():
        assert main([*asks, *wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"adapter": {}, "train": {}, "data": {}}')
    return str(tmp_path / "run")


def test_a_table_shows_all_of_what_it_is_given(capsys, monkeypatch):
    """What is in square brackets is no markup of rich, and long values go on in the next line."""
    monkeypatch.setenv("COLUMNS", "60")
    long = "0123456789" * 10
    print_table({"targets": "[qv]", "why": "cannot read [/data/x]", "print": long}, "in [runs]")
    shown = capsys.readouterr().out
    assert "[qv]" in shown and "[/data/x]" in shown and "in [runs]" in shown
    assert "".join(c for c in shown if c.isdigit()) == long


@pytest.mark.filterwarnings("ignore:head_dim")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_is_checked_in_the_dtype_it_has(
    dtype: Any, bases: dict[str, Model], tmp_path: Path
) -> None:
    """Four bytes a number would not fit where two do. Heads whose scale is undone are float32."""
    save_hf(tmp_path / "out", fused_model(bases["plain"], WIDENED["zflora-uniform"]), dtype=dtype)
    params = trees.flatten(load_stock(tmp_path / "out").params)
    wide = {name for name, leaf in params.items() if str(leaf.dtype) != dtype}
    turned = {"layers/attn/q/kernel", "layers/attn/k/kernel"}
    assert wide == (set() if dtype == "float32" else turned)
    minimal = fused_model(bases["plain"], WIDENED["zflora-minimal"])
    save_hf(tmp_path / "minimal", minimal, dtype=dtype)
    model = load_stock(tmp_path / "minimal")
    assert {str(leaf.dtype) for leaf in trees.flatten(model.params).values()} == {dtype}
    stored = Shards(tmp_path / "minimal")
    for name, place in hf_table(model.config).items():
        leaf = trees.flatten(model.params)[place.leaf]
        found = leaf if place.layer is None else leaf[place.layer]
        want = place.to_native(stored.read(name).astype(np.float32))
        np.testing.assert_array_equal(np.asarray(found, np.float32), want, err_msg=name)
