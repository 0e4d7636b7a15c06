"""Metrics of a run: written to metrics.jsonl, and shown by trackers and a progress bar.

One line of metrics.jsonl is one record, {"step": 10, "split": "train", "loss": 1.25, ...}, of the
number of complete steps: a run restored from the checkpoint of step 10 writes step 11 next.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import Mirror, as_path
from zflora_jax.core.textfile import lines_of
from zflora_jax.reporting.files import atomic_write, plain
from zflora_jax.reporting.progress import TrainingProgress
from zflora_jax.reporting.trackers import RUN_ID, TRACKERS, Tracker

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Context manager that writes a run's metrics under `workdir`.

    Args:
      workdir: The run's directory or URL, made if missing.
      total_steps: Number of steps at the end of the progress bar.
      console: Whether to show progress; a bar on a terminal, lines elsewhere.
      start_step: The step restored from a checkpoint. A killed run's records of later steps are
        dropped, because they will be computed again; 0 starts new files.
      report_to: Rows of `trackers.TRACKERS`.
      config: The settings that trackers show next to the metrics.
      log_every: Steps between two lines of progress, if there is no bar.
      before_upload: Called before files are uploaded; an exception from it prevents that.

    Raises:
      ConfigError: A tracker did not start.
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        console: bool = True,
        start_step: int = 0,
        report_to: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        log_every: int = 1,
        before_upload: Callable[[], None] = lambda: None,
    ) -> None:
        path = as_path(workdir, "workdir") / METRICS_FILE
        there = _parse(path) if start_step > 0 and path.exists() else []
        kept = [r for r in there if r["step"] <= start_step]
        self._before_upload = before_upload
        self._restored = {(r["step"], r["split"]) for r in kept}
        self._mirror = Mirror(path.parent, (RUN_ID,))
        self._file = self._mirror.path / METRICS_FILE
        atomic_write(self._file, "".join(json.dumps(r) + "\n" for r in kept).encode())
        shown = self._mirror.path, start_step, config or {}
        try:
            self._trackers = [TRACKERS[name](*shown) for name in report_to]
        except BaseException:
            self._mirror.close()
            raise
        self._progress = TrainingProgress(total_steps, start_step, log_every) if console else None

    def restored(self, step: int, split: str) -> bool:
        """True if the file had a record of `step` and `split` when it was opened."""
        return (step, split) in self._restored

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends a record. split: "train" or "eval"; values: Numbers by name, Python's, numpy's or
        jax's; those that are not finite become null.
        """
        if clash := {"step", "split"} & set(values):
            raise ValueError(f"metric names {sorted(clash)} are reserved: rename them.")
        numbers = {name: float(value) for name, value in values.items()}
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": int(step), "split": split, **plain(numbers)}) + "\n")
        shown = {f"{split}/{name}": value for name, value in numbers.items()}
        self._show(lambda tracker: tracker.write(int(step), shown))

    def progress(self, step: int, text: str) -> None:
        """Shows that `step` steps are complete."""
        if self._progress is not None:
            self._progress.update(step, text)

    def part(self, total: int, text: str) -> AbstractContextManager[Callable[[int], None]] | None:
        """Shows progress of `total` steps of other work, see `TrainingProgress.part`."""
        return None if self._progress is None else self._progress.part(total, text)

    def sync(self) -> None:
        """Uploads what has been written, if the run is in a bucket; OSError if that fails."""
        self._before_upload()
        self._mirror.sync()

    def _show(self, call: Callable[[Tracker], None]) -> None:
        """Calls every tracker. Drops one that raises: a full disk must not end the training."""
        for tracker in tuple(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                name = type(tracker).__name__
                log.warning("%s failed and shows no more of this run: %s", name, error)
                self._trackers.remove(tracker)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.close()
        self._show(lambda tracker: tracker.close())
        try:
            self.sync()  # trackers write when they are closed, too
        except OSError as error:
            log.warning("%s", error)
        self._mirror.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in file order; the last one of a step and split counts."""
    latest = {(r["step"], r["split"]): r for r in _parse(as_path(path))}
    return list(latest.values())


def _parse(path: Path) -> list[dict[str, Any]]:
    """All records, without the broken last line of a killed run; other broken lines raise."""
    records = []
    lines = lines_of(path.read_bytes().decode("utf-8", errors="replace"))
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not {"step", "split"} <= record.keys():
                raise ValueError("no step or no split")
        except (ValueError, AttributeError) as error:
            if number == len(lines):
                break
            text = f"not a metrics record ({error}). Repair or delete the line."
            raise ConfigError(f"{path}, line {number}: {text}") from error
        records.append(record)
    return records
