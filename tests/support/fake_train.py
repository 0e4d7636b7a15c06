"""`train` without training, for the bookkeeping of sweeps and studies."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import override, to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.train import Trained

ENVIRONMENT = {
    "command": "zflora sweep",
    "commit": "c0ffee",
    "dirty": False,
    "date": "2026-11-26T00:00:00+00:00",
    "device": "cpu",
    "cpu_count": 2,
    "jax": "0.10.2",
}


def loss_of(run: RunConfig) -> float:
    """A loss that depends on every setting of `run`, and on nothing else."""
    return 1 + zlib.crc32(json.dumps(to_dict(run)).encode()) / 2**32


class FakeTrain:
    """Reports `loss` of the settings at once, and leaves the files of a finished run. Each call's
    settings are in `runs`.
    """

    def __init__(self, loss: Callable[[RunConfig], float] = loss_of) -> None:
        self.loss = loss
        self.runs: list[RunConfig] = []

    def __call__(self, run: RunConfig, workdir: Path, *, model: Any = None, **_: Any) -> Trained:
        self.runs.append(run)
        report = {
            "params_trainable": 7,
            f"{run.eval.split}_loss": self.loss(run),
            "steps": run.train.steps,
            "seconds": 1.5,
            "first_step_seconds": 0.5,
            "train_rows": 9,
            "train_rows_dropped": 1,
            "train_documents_cut": 0,
            "environment": ENVIRONMENT | {"more": "of it"},
        }
        run = override(run, {"data.date": "2026-11-26"})
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(json.dumps(to_dict(run)))
        (workdir / "report.json").write_text(json.dumps(report | {"config": to_dict(run)}))
        return Trained(model, {}, report, run)
