"""A release works alone: the sdist has all files, and its wheel runs outside the clone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
from support.paths import ROOT

# As a user's shell: each command by the wheel's package, on a model of the sdist's tools.
COMMANDS = """
import contextlib, sys
for name in ("pytest", "torch"):
    sys.modules[name] = None  # not installed
import zflora_jax
from zflora_jax.cli.main import main
print(zflora_jax.__file__)
sys.path.append(sys.argv[1])
import tiny_model
tiny_model.main("tiny")
for line in sys.stdin:
    print("---", line, end="", flush=True)
    with contextlib.suppress(SystemExit):
        if code := main(line.split()):
            sys.exit(code)
"""
FEW = (
    "data.batch_size=2 data.bucket_lengths=320 data.train_limit=8 optim.warmup_steps=1"
    " train.steps=2 train.loss_chunk=128 adapter.rank=4 eval.limit=2"
)


def python(*words: str, cwd: Path, **more: object) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, **more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_a_wheel_runs_outside_the_clone(tmp_path):
    source, installed, there = (tmp_path / name for name in ("clone", "installed", "there"))
    there.mkdir()
    folders = re.findall(r"^graft (\S+)", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    for folder in (*folders, "zflora_jax", "zflora_vllm"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.svg")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=unwanted)
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, source)
    wanted = {x.relative_to(source).as_posix() for x in source.rglob("*/*") if x.is_file()}
    python("-c", "import setuptools.build_meta as b; b.build_sdist('.')", cwd=source)
    [sdist] = source.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    tree = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert not wanted - {x.relative_to(tree).as_posix() for x in tree.rglob("*/*")}
    # pip builds a wheel of it, with the setuptools that is here.
    pip = "-m pip install --no-build-isolation --no-deps --no-index --no-compile --target".split()
    python(*pip, str(installed), str(sdist), cwd=tmp_path)
    commands = (
        *("--version", "--help", "init chat --out own.py"),
        "data --config own.py --set model=tiny data.task=arithmetic data.bucket_lengths=512",
        f"train --config quickstart --workdir run --set model=tiny {FEW}",
    )
    env = os.environ | {"PYTHONPATH": str(installed), "JAX_NUM_CPU_DEVICES": "1"}
    if kept := jax.config.jax_compilation_cache_dir:
        env |= {"JAX_COMPILATION_CACHE_DIR": str(kept), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    given = ("-c", COMMANDS, str(tree / "tools"))
    out = python(*given, cwd=there, env=env, input="".join(f"{c}\n" for c in commands))
    assert out.startswith(str(installed)) and "zflora 0.1.0" in out and "trained in run" in out
    assert (there / "run" / "report.json").is_file()
