"""Trackers show a run's metrics elsewhere; as they are in metrics.jsonl, too, one may fail."""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.reporting.files import atomic_write

RUN_ID = "tracker_id"  # a file in the workdir


class Tracker(Protocol):
    """Shows the metrics of one run. It is made from the run's directory, the step restored from a
    checkpoint (0: from the start), and the settings that are shown next to the metrics.
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


class Trackio:
    """trackio, and the interface that it shares with wandb. A resumed run goes on in the same
    place. The package's own environment variables set the rest (WANDB_MODE, TRACKIO_SPACE_ID).
    """

    package: ClassVar[str] = "trackio"

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any]) -> None:
        module = importlib.import_module(self.package)
        remembered = workdir / RUN_ID
        if start_step == 0 or not remembered.is_file():  # a run from the start is another run
            atomic_write(remembered, secrets.token_hex(4).encode())
        identity = remembered.read_text(encoding="utf-8")
        more = self._settings(workdir, identity)
        more |= {"project": os.environ.get(f"{self.package.upper()}_PROJECT", "zflora_jax")}
        more |= {"name": f"{workdir.resolve().name}-{identity}", "config": dict(config)}
        try:
            self._run = module.init(resume="allow", **more)
        except Exception as error:  # each has its own: no key, no network, ...
            raise ConfigError(
                f"train.report_to: {self.package} did not start: {error} (WANDB_MODE=offline keeps"
                " wandb's files local)."
            ) from error

    def _settings(self, workdir: Path, identity: str) -> dict[str, Any]:
        return {}

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class Wandb(Trackio):
    """Weights & Biases."""

    package: ClassVar[str] = "wandb"

    def __init__(self, workdir: Path, start_step: int, config: Mapping[str, Any]) -> None:
        super().__init__(workdir, start_step, config)
        # wandb's own step never goes back, but that of a run resumed from its checkpoint may.
        self._run.define_metric("*", step_metric="step")

    def _settings(self, workdir: Path, identity: str) -> dict[str, Any]:
        # "create_new", as runs of a sweep may train side by side.
        return {"id": identity, "dir": str(workdir), "reinit": "create_new"}

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
"""The trackers by the names that train.report_to has for them."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuses names without a row in `TRACKERS`, and trackers whose package is missing."""
    for i, name in enumerate(names):
        require(name in TRACKERS, f"train.report_to[{i}]={name!r}: {nearest(name, TRACKERS)}.")
        package = TRACKERS[name].package
        require(
            not package or importlib.util.find_spec(package) is not None,
            f"train.report_to: {name!r}, which is not installed: pip install {package}.",
        )
