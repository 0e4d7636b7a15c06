"""Two processes on loopback train, evaluate, generate and export together: the numbers, answers and
files of one process, and no process reads the whole of a tensor that is divided.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from support.grids import always
from support.hosts import commands, config_file, finish, losses
from support.runs import small_run

from zflora_jax import RunConfig, load_run, override, train
from zflora_jax.cli.main import main
from zflora_jax.core import trees

# As many and as long as the problems of `eval`: they run the same program.
PROMPTS = f"2+3=\nWhat is 12 plus 7?\n{'How many are left? ' * 4}\n3+4=\n"


@pytest.fixture
def four(model_dir: Path) -> RunConfig:
    """A run over four devices, of which two hold half of the model."""
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 2, "data.grad_accum_steps": 1}
    short = {"train.steps": 3, "data.bucket_lengths": (320,), "data.train_limit": 16}
    return override(small_run(str(model_dir)), mesh | short)


def uses(workdir: Path, out: Path, kernels: str = "none") -> list[list[str]]:
    """The commands that use a trained run. With quantised kernels they also generate from the
    export, and export the codes themselves.
    """
    (out / "prompts.txt").write_text(PROMPTS)
    run, mesh = ["--workdir", str(workdir)], ["--set", "mesh.fsdp=2", "mesh.tensor=2"]
    short = ["--max-new-tokens", "8"]
    file = out / ("export" if kernels == "none" else "export.gguf")
    written = ["--format", "hf"] if kernels == "none" else ["--format", "gguf", "--quant", "q8_0"]
    every = [
        ["eval", *run, "--out", str(out / "eval")],
        ["generate", *run, "--file", str(out / "prompts.txt"), *short],
        ["export", *run, "--out", str(file), *written],
    ]
    if kernels != "none":
        every.append(["generate", "--model", str(file), "--prompt", "2+3=", *short, *mesh])
        every.append(["export", *run, "--out", str(out / "codes"), "--quant", kernels])
    return every


def said(output: str) -> list[str]:
    """The answers that `generate` printed."""
    parts = [part.split("\n", 1)[1] for part in output.split("--- ")[1:] if part[:8] == "generate"]
    logged = ("[Gloo]", "loading ", "compiling ")  # stderr is in the same pipe
    return ["\n".join(x for x in part.splitlines() if not x.startswith(logged)) for part in parts]


@pytest.mark.parametrize("kernels", always(["none", "int8"], "none".__eq__))
def test_two_processes_do_what_one_does(kernels, four, tmp_path, capsys):
    four = override(four, {"quantize.kernels": kernels})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    workdir = tmp_path / "two" / "run"
    argv = ["train", "--config", config_file(four, tmp_path / "c.py"), "--workdir", str(workdir)]
    first, second = finish(
        commands([argv, *uses(workdir, tmp_path / "two", kernels)], 2, devices=2)
    )
    train(four, tmp_path / "one" / "run", console=False)
    np.testing.assert_allclose(losses(workdir), losses(tmp_path / "one" / "run"), rtol=2e-5)
    report, wanted = (
        json.loads((tmp_path / name / "run" / "report.json").read_text()) for name in ("two", "one")
    )
    assert report["processes"] == 2 and report["steps"] == 3
    for key in ("base_fingerprint", "data_fingerprint", "train_rows"):
        assert report[key] == wanted[key], key
    assert "trained in" in first and "trained in" not in second
    one, two = (trees.flatten(load_run(tmp_path / name / "run")[2]) for name in ("one", "two"))
    for name, leaf in one.items():
        np.testing.assert_allclose(two[name], leaf, atol=2e-4, err_msg=name)

    # One process does the same with the run that two have trained.
    capsys.readouterr()
    printed = []
    for argv in uses(workdir, tmp_path / "one", kernels):
        assert main(argv) == 0
        printed.append(capsys.readouterr().out)
    answers, silence = said(first), said(second)
    if kernels != "none":  # what is kept of the file is told before its answer, by all processes
        answers[1], silence[1] = answers[1].splitlines()[-1], ""
    wanted_answers = [printed[i].rstrip("\n") for i in ((1,) if kernels == "none" else (1, 3))]
    assert answers == wanted_answers and silence == [""] * len(answers)
    assert_same_evaluation(tmp_path / "one" / "eval", tmp_path / "two" / "eval")
    if kernels == "none":
        assert_same_files(tmp_path / "one" / "export", tmp_path / "two" / "export")
    else:
        files = (tmp_path / name / "export.gguf" for name in ("one", "two"))
        assert len({file.read_bytes() for file in files}) == 1
        assert_same_files(tmp_path / "one" / "codes", tmp_path / "two" / "codes")


def assert_same_evaluation(one: Path, two: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir()) and len(names) == 4
    [rows] = one.glob("arithmetic*.jsonl")
    assert (two / rows.name).read_text() == rows.read_text()
    [summary] = one.glob("summary-*.json")
    here, there = (json.loads((folder / summary.name).read_text()) for folder in (one, two))
    assert here["origin"] == there["origin"]
    np.testing.assert_allclose(there["tasks"][0]["loss"], here["tasks"][0]["loss"], rtol=2e-5)


def assert_same_files(one: Path, two: Path) -> None:
    """Byte for byte."""
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(two)) for p in two.rglob("*") if p.is_file())
    assert "model.safetensors" in names
    for name in names:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
