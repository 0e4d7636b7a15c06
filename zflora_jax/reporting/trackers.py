"""Where a run's numbers are shown: TensorBoard events, Weights & Biases, trackio. Each takes (step,
{name: number}) and closes.

The last two are optional packages with one interface, wandb's. metrics.jsonl (see `metrics`) is the
record; what is here can be lost without loss.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from zflora_jax.core.fields import ConfigError
from zflora_jax.reporting.files import atomic_write

TENSORBOARD_DIR, RUN_ID = "tensorboard", "tracker_id"
PROJECT = "zflora_jax"  # WANDB_PROJECT and TRACKIO_PROJECT name another one
OPTIONAL = ("wandb", "trackio")


class Tracker(Protocol):
    def write(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def require_installed(names: Sequence[str]) -> None:
    """ConfigError for a tracker whose package is missing, before anything slow."""
    for name in names:
        if name in OPTIONAL and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.report_to names {name!r}, which is not installed: pip install {name}, or"
                " leave it out of train.report_to."
            )


def make_trackers(
    names: Sequence[str], workdir: Path, start_step: int, config: Mapping[str, Any]
) -> list[Tracker]:
    """A tracker per name. start_step: the step restored from a checkpoint. config: what the run is
    shown with.
    """
    return [
        (
            TensorBoard(workdir, start_step)
            if name == "tensorboard"
            else WandbLike(name, workdir, start_step, config)
        )
        for name in names
    ]


class TensorBoard:
    """Events in <workdir>/tensorboard."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(
            str(workdir / TENSORBOARD_DIR),
            purge_step=(
                start_step + 1 if start_step else 0
            ),  # TensorBoard hides earlier events from this step on
            # File names count whole seconds: a quick restart would overwrite its predecessor's
            filename_suffix=f".{start_step}",
            flush_secs=10,
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class WandbLike:
    """wandb, or trackio, which has its interface. A resumed run goes on in the same place; keys,
    entities, spaces and offline mode are set by the package's own environment variables
    (WANDB_MODE=offline, TRACKIO_SPACE_ID, ...).
    """

    def __init__(
        self, package: str, workdir: Path, start_step: int, config: Mapping[str, Any]
    ) -> None:
        module = importlib.import_module(package)
        remembered = workdir / RUN_ID
        if start_step == 0 or not remembered.is_file():  # a run from the start is another run
            atomic_write(remembered, secrets.token_hex(4).encode())
        identity = remembered.read_text(encoding="utf-8")
        settings: dict[str, Any] = {
            "name": f"{workdir.resolve().name}-{identity}",
            "config": dict(config),
            "resume": "allow",
        }
        if package == "wandb":
            # Runs of a sweep may train side by side.
            settings |= {
                "id": identity,
                "dir": str(workdir),
                "reinit": "create_new",
            }
        try:
            self._run = module.init(
                project=os.environ.get(f"{package.upper()}_PROJECT", PROJECT), **settings
            )
        except Exception as error:  # each has its own: no key, no network, ...
            raise ConfigError(
                f"train.report_to: {package} did not start: {error} (WANDB_MODE=offline keeps"
                " wandb's files local)."
            ) from error
        self._stepped = package == "wandb"
        if (
            self._stepped
        ):  # wandb's own step never goes back, as a run does that resumes from its last checkpoint
            self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._stepped:
            self._run.log({**numbers, "step": step})
        else:
            self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
