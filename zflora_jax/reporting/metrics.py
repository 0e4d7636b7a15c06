"""Metrics of a run: written to metrics.jsonl, and shown by trackers and a progress bar.

One line of metrics.jsonl is one record, {"step": 10, "split": "train", "loss": 1.25, ...}. A step
is counted when it is complete: the record of step 10 describes what ten updates have led to, and a
run restored from the checkpoint of step 10 writes step 11 next.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
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
    """Writes a run's metrics under `workdir`; use it as a context manager.

    Args:
      workdir: The run's directory or URL, made if missing.
      total_steps: Where the progress bar ends.
      console: Whether to show progress; a bar on a terminal, a line every few seconds elsewhere.
      start_step: The step restored from a checkpoint. Records that a killed run wrote about later
        steps are dropped, since they are about to be computed again; 0 starts the files anew.
      report_to: Rows of `trackers.TRACKERS`.
      config: The settings that trackers show next to the metrics.
      before_upload: Called before files are uploaded to a bucket; an exception from it prevents
        that.

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
        before_upload: Callable[[], None] = lambda: None,
    ) -> None:
        path = as_path(workdir, "workdir") / METRICS_FILE
        there = _parse(path) if start_step > 0 and path.exists() else []
        kept = [r for r in there if r["step"] <= start_step]
        self._before_upload = before_upload
        self._restored = {(r["step"], r["split"]) for r in kept}
        self._mirror = Mirror(path.parent, (RUN_ID,))
        file = self._mirror.path / METRICS_FILE
        atomic_write(file, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115
        self._trackers: list[Tracker] = []
        try:  # they may refuse
            for name in report_to:
                self._trackers += [TRACKERS[name](self._mirror.path, start_step, config or {})]
        except BaseException:
            self._file.close()
            self._mirror.close()
            raise
        self._progress = TrainingProgress(total_steps, start_step) if console else None
        self._closed = False

    def restored(self, step: int, split: str) -> bool:
        """Whether the file had a record of `step` and `split` when it was opened."""
        return (step, split) in self._restored

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends one record.

        Args:
          step: Number of finished steps.
          split: "train" or "eval".
          values: Numbers by name, Python's or scalars of numpy or jax. NaN and infinity become null
            in the file.
        """
        clash = {"step", "split"} & set(values)
        if clash:
            raise ValueError(
                f"metric names {sorted(clash)} are taken by the record itself; rename them."
            )
        numbers = {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": int(step), "split": split, **plain(numbers)}) + "\n")
        self._file.flush()
        shown = {f"{split}/{name}": value for name, value in numbers.items()}
        self._show(lambda tracker: tracker.write(int(step), shown))

    def progress(self, step: int, text: str) -> None:
        """Shows that `step` steps are complete."""
        if self._progress is not None:
            self._progress.update(step, text)

    def sync(self) -> None:
        """Uploads what has been written, if the run is in a bucket.

        Raises:
          OSError: An upload failed.
        """
        self._before_upload()
        self._mirror.sync()

    def close(self) -> None:
        """Flushes and closes everything; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._progress is not None:
            self._progress.close()
        self._show(lambda tracker: tracker.close())
        self._file.close()
        try:
            self.sync()  # trackers write when they are closed, too
        except OSError as error:
            log.warning("%s", error)
        self._mirror.close()

    def _show(self, call: Callable[[Tracker], None]) -> None:
        """Calls every tracker. Drops one that raises: its full disk must not end the training."""
        for tracker in tuple(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                log.warning(
                    "%s failed and shows no more of this run: %s", type(tracker).__name__, error
                )
                self._trackers.remove(tracker)

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in file order. Of several with the same step and split the
    last one counts.
    """
    latest = {(r["step"], r["split"]): r for r in _parse(as_path(path))}
    return list(latest.values())


def _parse(path: Path) -> list[dict[str, Any]]:
    """All records, without a broken last line, as a killed run leaves; others raise."""
    records = []
    lines = lines_of(path.read_bytes().decode("utf-8", errors="replace"))
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                raise ValueError("no step")
            if not isinstance(record.get("split"), str):
                raise ValueError("no split")
        except ValueError as error:
            if number == len(lines):
                break
            raise ConfigError(
                f"{path}, line {number}: not a metrics record ({error}). Repair or delete the line."
            ) from error
        records.append(record)
    return records
