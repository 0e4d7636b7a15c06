"""Trackers, which also show a run's metrics. One may fail, as metrics.jsonl has them too."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from zflora_jax.core.fields import ConfigError, require, require_in
from zflora_jax.reporting.files import atomic_write

RUN_ID = "tracker_id"  # a file in the workdir


class Tracker(Protocol):
    """Shows the metrics of one run. Its arguments are the run's directory, the step restored from a
    checkpoint (0: from the start), and the settings to show next to the metrics.
    """

    package: ClassVar[str]  # the optional package that it needs, "" if it needs none

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any]) -> None: ...
    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Events in <workdir>/tensorboard."""

    package: ClassVar[str] = ""

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        # TensorBoard hides events of this step and later that were written before.
        purge = start_step + 1 if start_step else 0
        # File names count whole seconds: a quick restart would overwrite its predecessor's.
        more: dict[str, Any] = {"filename_suffix": f".{start_step}", "flush_secs": 10}
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge, **more)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class Wandb:
    """Weights & Biases. A resumed run continues its record there. The package's environment
    variables set the rest (WANDB_MODE, WANDB_PROJECT).
    """

    package: ClassVar[str] = "wandb"

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any]) -> None:
        import wandb

        remembered = workdir / RUN_ID
        if start_step == 0 or not remembered.is_file():  # a run from the start is another run
            atomic_write(remembered, secrets.token_hex(4).encode())
        identity = remembered.read_text("utf-8")
        name = {"id": identity, "name": f"{workdir.resolve().name}-{identity}"}
        place = {"dir": str(workdir), "project": os.environ.get("WANDB_PROJECT", "zflora_jax")}
        # "create_new", as runs of a sweep may train side by side.
        how = {"resume": "allow", "reinit": "create_new"}
        try:
            self._run = wandb.init(config=dict(config), **name, **place, **how)
        except Exception as error:  # no key, no network, ...
            raise ConfigError(
                f"train.report_to: wandb did not start: {error} (WANDB_MODE=offline keeps its files"
                " local)."
            ) from error
        # wandb's own step never goes back, but that of a run resumed from its checkpoint may.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}
"""The trackers by their names in train.report_to."""


def require_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for names not in `TRACKERS` and trackers whose package is missing."""
    for i, name in enumerate(names):
        require_in(TRACKERS, name, f"train.report_to[{i}]={name!r}")
        package = TRACKERS[name].package
        require(
            not package or importlib.util.find_spec(package) is not None,
            f"train.report_to: {name!r}, which is not installed: pip install {package}.",
        )
