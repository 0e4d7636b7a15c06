"""Commands in several processes on loopback, each with CPU devices of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from support.paths import ROOT
from zflora_jax.core.fields import to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.reporting.metrics import read_metrics


def spawn(
    arguments: list[str],
    processes: int,
    devices: int,
    *,
    flags: bool = False,
    folders: Sequence[Path | None] = (None, None),
) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` in `processes` processes of `devices` CPU devices each, which find each
    other by the environment, or with `flags` by --coordinator and its sisters; folders: theirs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    common = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    # As conftest has it for this process: programs that compile fast, and are kept.
    common |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if kept := jax.config.jax_compilation_cache_dir:
        least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
        common |= {"JAX_COMPILATION_CACHE_DIR": str(kept), least: "0"}
    given = {"coordinator": f"127.0.0.1:{port}", "num_processes": str(processes)}
    started = []
    for i in range(processes):
        here = given | {"process_id": str(i)} if processes > 1 else {}
        words = [w for name, x in here.items() for w in (f"--{name.replace('_', '-')}", x)]
        named = {f"ZFLORA_{name.upper()}": value for name, value in here.items()}
        started.append(
            subprocess.Popen(
                [sys.executable, *arguments, *(words if flags else [])],
                env=os.environ | common | ({} if flags else named),
                cwd=folders[i],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(processes: list[subprocess.Popen[str]], code: int = 0, seconds: int = 300) -> list[str]:
    """The outputs of processes that end with `code`."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), "\n---\n".join(
        out[-3000:] for out in outputs
    )
    return outputs


def losses(workdir: Path) -> np.ndarray:
    """Step, loss and tokens of every training record."""
    found = [r for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "train"]
    return np.asarray([[r["step"], r["loss"], r["tokens"]] for r in found])


def config_file(run: RunConfig, path: Path) -> str:
    """A file for --config that gives `run`."""
    imports = (
        "from zflora_jax.config import RunConfig\nfrom zflora_jax.core.fields import from_dict\n"
    )
    path.write_text(
        f"{imports}def get_config():\n    return from_dict(RunConfig, {to_dict(run)!r})\n"
    )
    return str(path)


def commands(argvs: list[list[str]], processes: int, devices: int) -> list[subprocess.Popen[str]]:
    """The commands one after the other in every process, until one fails."""
    code = """if True:
        import json, sys
        sys.modules["torch"] = None  # transformers would load it, for 3 seconds
        from zflora_jax.cli.main import main
        for argv in json.loads(sys.argv[1]):
            print("---", argv[0], flush=True)
            if code := main(argv):
                sys.exit(code)
    """
    return spawn(["-c", code, json.dumps(argvs)], processes, devices)
