"""A lab: a run, what it gives when nothing goes wrong, and processes (or this one) that run it with
a fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support import fault_driver
from support.runs import saved_state
from zflora_jax.core import trees
from zflora_jax.core.fields import override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.reporting.metrics import read_metrics

TESTS = Path(__file__).parents[1]
PATIENCE = 300  # seconds that any one process may take


@dataclass(frozen=True)
class Outcome:
    """survived: all that was promised held. lost_steps: committed steps that the resumed run did
    not start from. message: what the user was told.
    """

    survived: bool
    lost_steps: int = 0
    message: str = ""


def lab_run(run: RunConfig) -> RunConfig:
    """`run` for a Lab: long enough to be hit somewhere, every step logged, eight rows so that eight
    devices have one each.
    """
    return override(
        run,
        {
            "train.steps": 24,
            "train.max_to_keep": 3,
            "data.batch_size": 8,
            "data.grad_accum_steps": 1,
            "data.bucket_lengths": [256],
        },
    )


class Lab:
    """A run, what it gives when nothing goes wrong, and processes that run it."""

    def __init__(self, run: RunConfig, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (
            "warm",
            "whole",
        ):  # the first fills the compile cache: later runs take what the second does
            started = time.monotonic()
            code, output = self.once(folder / name)
            assert code == 0, output
            self.seconds = time.monotonic() - started
        self.whole = self.state(folder / "whole")
        self.lines = self.logged(folder / "whole")

    def start(
        self, workdir: Path, fault: dict[str, Any] | None = None, devices: int = 1, **changes: Any
    ) -> subprocess.Popen[str]:
        run = override(self.run, {key.replace("__", "."): value for key, value in changes.items()})
        env = os.environ | {
            "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        env |= {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [
            sys.executable,
            str(TESTS / "support" / "fault_driver.py"),
            json.dumps(dataclasses.asdict(run)),
            str(workdir),
            json.dumps(fault or {}),
        ]
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def once(
        self, workdir: Path, fault: dict[str, Any] | None = None, devices: int = 1, **changes: Any
    ) -> tuple[int, str]:
        """Exit code and output of one run."""
        return self.finish(self.start(workdir, fault, devices, **changes))

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        return process.returncode, output

    def state(self, workdir: Path) -> str:
        """A fingerprint of all that the newest checkpoint holds."""
        return trees.fingerprint(saved_state(self.run, workdir))

    @staticmethod
    def logged(workdir: Path) -> list[tuple[Any, ...]]:
        rows = [r for r in read_metrics(workdir / "metrics.jsonl") if r["split"] == "train"]
        return [(r["step"], r["loss"], r["grad_norm"], r["batch_crc32"]) for r in rows]

    @staticmethod
    def committed(workdir: Path) -> int:
        """The newest step whose checkpoint has its final name."""
        folder = workdir / "checkpoints"
        return (
            max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)
            if folder.is_dir()
            else 0
        )

    def goes_on(self, workdir: Path, committed: int, message: str = "") -> Outcome:
        """Resume to the end, and compare with the uninterrupted run."""
        code, output = self.once(workdir)
        if code != 0:
            return Outcome(False, 0, output[-1000:])
        resumed = json.loads((workdir / "report.json").read_text())["resumed_from"]
        same = self.state(workdir) == self.whole and self.logged(workdir) == self.lines
        return Outcome(same and resumed >= committed, max(0, committed - resumed), message)

    def wait_for(self, workdir: Path, step: int, process: subprocess.Popen[str]) -> None:
        """Until the log shows `step`, or the process has ended."""
        metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + PATIENCE
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and not (metrics.exists() and any(r[0] >= step for r in self.logged(workdir)))
        ):
            time.sleep(0.01)


class LocalLab(Lab):
    """The same within this process, which has all devices: what is compiled once stays, so a try
    takes a second or two. Nothing can be killed here.
    """

    def __init__(self, run: RunConfig, folder: Path) -> None:
        self.run, self.folder = run, folder
        code, output = self.once(folder / "whole")
        assert code == 0, output
        self.whole, self.lines = self.state(folder / "whole"), self.logged(folder / "whole")

    def once(
        self, workdir: Path, fault: dict[str, Any] | None = None, devices: int = 1, **changes: Any
    ) -> tuple[int, str]:
        run = override(self.run, {key.replace("__", "."): value for key, value in changes.items()})
        said, arguments = io.StringIO(), (json.dumps(dataclasses.asdict(run)), str(workdir))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.getsignal(signal.SIGTERM)  # a stopped command ignores what comes after
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            try:
                code = fault_driver.main(*arguments, json.dumps(fault or {}), patch)
            except Exception:  # Python would end with it
                code = 1
                said.write(traceback.format_exc())
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                signal.signal(signal.SIGTERM, handler)
        return code, said.getvalue()
