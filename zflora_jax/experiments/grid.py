"""Grids: a run and a row per combination of settings, failures among them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.errors import JaxRuntimeError

from zflora_jax.core.errors import CheckpointError, NonFiniteError, Preempted
from zflora_jax.core.fields import ConfigError, override, require, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.dates import dated
from zflora_jax.experiments.run_report import read_report
from zflora_jax.experiments.train import train
from zflora_jax.hf.load import load_model
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.reporting.files import local_path, plain, write_result
from zflora_jax.reporting.metrics import METRICS_FILE
from zflora_jax.reporting.plots import training_curves
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table
from zflora_jax.training.identity import same_numbers, settings as settings_of
from zflora_jax.training.lock import BusyError, locked
from zflora_jax.training.workdir import read_config, require_no_jump

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

Row = dict[str, Any]
Settings = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
Devices = Sequence[jax.Device]
FINISHED = "finished"
POLL = 5.0  # seconds between looks at runs that other processes are training
# Errors of one run that leave the others alone. XLA's, of memory too, are JaxRuntimeErrors.
_FAILURES = (ConfigError, CheckpointError, NonFiniteError, JaxRuntimeError, MemoryError)
_REPORTED = ("params_trainable", "steps", "seconds", "first_step_seconds")
_ORIGIN = ("commit", "dirty", "date", "device", "cpu", "jax")


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid that `zflora sweep` runs, returned by a config file's get_sweep().

    Attributes:
      base: Settings that every run shares.
      settings: Settings that change, see `combinations`.
    """

    base: RunConfig
    settings: Settings


def sweep(
    base: RunConfig,
    grid: Settings,
    workdir: str | Path,
    *,
    parallel: int | None = None,
    console: bool = False,
) -> DataFrame:
    """`run_grid` as a pandas DataFrame, one row per run.

    Args:
      base: Settings that the runs share; the other arguments as for `run_grid`.

    Raises:
      ConfigError: pandas is not installed; or as for `run_grid`.
    """
    try:
        import pandas
    except ImportError:
        raise ConfigError(
            "sweep returns a pandas DataFrame: pip install pandas, or call zf.run_grid for plain"
            " rows."
        ) from None
    return pandas.DataFrame(run_grid(base, grid, workdir, parallel=parallel, console=console))


def combinations(base: RunConfig, grid: Settings) -> list[tuple[str, dict[str, Any]]]:
    """The runs of a grid.

    Args:
      base: Settings that they share.
      grid: A table of lists, of which every combination is a run, or a list of tables, each a run.
        Settings are dotted: "adapter.rank".

    Returns:
      (name, changes) of every run.

    Raises:
      ConfigError: a setting that does not exist, an empty list, or a combination given twice.
    """
    if isinstance(grid, Mapping):
        for key, values in grid.items():
            require(
                not isinstance(values, str) and hasattr(values, "__len__") and len(values) > 0,
                f"grid[{key!r}]: give a list of at least one value.",
            )
        products = itertools.product(*grid.values())
        tables = [dict(zip(grid, values, strict=True)) for values in products]
    else:
        require(len(grid) > 0, "the grid is empty: give at least one combination of settings.")
        tables = [dict(changes) for changes in grid]
    every = [plain(changes) for changes in tables]  # numpy's scalars, too
    known = [key.replace("/", ".") for key in settings_of(base)]
    for key in sorted({key for changes in every for key in changes if key not in known}):
        inner = [name for name in known if name.startswith(f"{key}.")]
        require(not inner, f"{key!r} is a group of settings; give one, such as {inner[:1]}.")
        override(base, {key: "0"})  # names the nearest setting
    names = [_name(changes) for changes in every]
    twice = [name for name in names if names.count(name) > 1]
    require(not twice, f"the grid has {twice[:1]} twice; each combination runs once.")
    return list(zip(names, every, strict=True))


def _name(changes: Mapping[str, Any]) -> str:
    """A directory name from the changed settings; a long one is cut and ends in a hash."""
    text = ",".join(f"{key}={value}" for key, value in changes.items()) or "base"
    safe = re.sub(r"[^\w.,=+-]", "_", text)
    if safe == text and len(safe) <= 120:
        return safe
    return f"{safe[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def run_grid(
    base: RunConfig,
    grid: Settings,
    workdir: str | Path,
    *,
    parallel: int | None = None,
    console: bool = True,
) -> list[Row]:
    """Trains every combination of `grid` in <workdir>/<its name>.

    Finished runs are not trained again, stopped ones go on, failed ones are tried again. A run that
    another process trains is waited for. <workdir>/rows.json and rows.md are written after every
    run, <workdir>/curves at the end; the runs share <workdir>/compile_cache.

    Args:
      base: Settings that the runs share.
      grid: Settings that change, see `combinations`.
      workdir: Directory of the runs.
      parallel: Number of runs at one time, each on the devices of its mesh; None: all that fit.
      console: Whether a run shows its progress if it is the only one at a time.

    Returns:
      A row per run, in the order of `combinations`: run (its name), the settings that the grid
      changes, status ("finished", or "failed: why"), params_trainable, the held-out loss
      (validation_loss or test_loss, as eval.split says), steps, seconds, and where it was trained
      (commit, device, ...). Runs fail whose settings or model cannot be used, whose directory holds
      a run of other settings, whose loss is not a number, and that need too much memory.

    Raises:
      ConfigError: as for `combinations`, or more runs at one time than fit.
      Preempted: a signal came; the runs that were training are saved after their step.
    """
    workdir, named = local_path(workdir, "workdir"), combinations(base, grid)
    slots, env, bases = _slots(base, named, parallel), environment(), _Bases()
    done: dict[str, Row] = {}

    def attempt(name: str, changes: dict[str, Any], devices: Devices) -> Row | None:
        try:
            run, folder, alone = override(base, changes), workdir / name, len(slots) == 1
            return _finished(run, folder) or _train(run, folder, bases, devices, console and alone)
        except BusyError:
            return None
        except _FAILURES as error:
            return {"status": f"failed: {str(error) or type(error).__name__}"}

    with compile_cache(workdir / "compile_cache"):
        left = dict(named)
        while left:
            for name, found in _each(attempt, left.items(), slots):
                if found is not None:
                    done[name] = {"run": name, **left[name], **found}
                    log.info("%s: %s", name, found["status"])
                    rows = [done[name] for name, _ in named if name in done]
                    _write(workdir, base, rows, len(named), env)
            left = {name: changes for name, changes in named if name not in done}
            if left:
                time.sleep(POLL)
    _draw(workdir, named)
    return [done[name] for name, _ in named]


def _finished(run: RunConfig, folder: Path) -> Row | None:
    """The row of a run that is finished with these settings, from its report; else None."""
    report = read_report(folder)
    if report is None or f"{run.eval.split}_loss" not in report:
        return None
    there = read_config(folder)
    same = report["steps"] == run.train.steps and same_numbers(there, dated(run, there.data.date))
    return _row(run, report) if same else None


def _train(run: RunConfig, folder: Path, bases: _Bases, devices: Devices, console: bool) -> Row:
    """Trains a run, or goes on with it, and returns its row."""
    if folder.is_dir():
        with locked(folder):  # raises BusyError before anything slow
            require_no_jump(folder, run)
    model = bases.of(run, devices)
    trained = train(run, folder, model=model, devices=devices, console=console)
    if trained.signalled:
        raise Preempted(f"stopped by a signal; {folder} is saved, the same command goes on there.")
    return _row(run, trained.report)


def _row(run: RunConfig, report: Mapping[str, Any]) -> Row:
    """The columns of a finished run."""
    measured = {key: report[key] for key in (f"{run.eval.split}_loss", *_REPORTED) if key in report}
    origin = {key: report["environment"].get(key) for key in _ORIGIN}
    return {"status": FINISHED} | measured | origin


def _each(
    attempt: Callable[[str, dict[str, Any], Devices], Row | None],
    runs: Iterable[tuple[str, dict[str, Any]]],
    slots: Sequence[Devices],
) -> Iterator[tuple[str, Row | None]]:
    """Yields (name, row) of each attempt: in this thread, or with several slots in a pool."""
    free = list(slots)  # list.pop and append are atomic

    def one(name: str, changes: dict[str, Any]) -> tuple[str, Row | None]:
        devices = free.pop()
        try:
            return name, attempt(name, changes, devices)
        finally:
            free.append(devices)

    if len(slots) == 1:
        yield from itertools.starmap(one, runs)
        return
    with StopSignals(), ThreadPoolExecutor(len(slots)) as pool:
        try:
            for done in as_completed([pool.submit(one, *run) for run in runs]):
                yield done.result()
        except BaseException:  # a signal, or an error that is no result: begin no more runs
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _draw(workdir: Path, named: Sequence[tuple[str, Any]]) -> None:
    curves = {n: path for n, _ in named if (path := workdir / n / METRICS_FILE).is_file()}
    with contextlib.suppress(ValueError):  # no run came to its first number
        training_curves(curves, workdir / "curves", f"{workdir.resolve().name}: {len(curves)} runs")


def _slots(
    base: RunConfig, named: Sequence[tuple[str, Mapping[str, Any]]], parallel: int | None
) -> list[Devices]:
    """The devices of each run that trains at one time."""
    size, count = base.mesh.devices, jax.device_count()
    if any(key.startswith("mesh.") for _, changes in named for key in changes):
        size = count  # meshes that differ take turns
    firsts = range(0, count - size + 1, size)
    slots: list[Devices] = [jax.devices()[i : i + size] for i in firsts] or [jax.devices()]
    require(
        parallel is None or 1 <= parallel <= len(slots),
        f"parallel={parallel}: must be within 1..{len(slots)}, for runs of {size} devices.",
    )
    return slots[: parallel or len(slots)]


class _Bases:
    """The base model on each device, loaded once for consecutive runs that share it."""

    def __init__(self) -> None:
        self._loaded: dict[jax.Device, tuple[Any, Model]] = {}

    def of(self, run: RunConfig, devices: Devices) -> Model | None:
        """The base of a run; None on several devices, where each run loads its slices."""
        if len(devices) > 1:
            return None
        [device], key = devices, (run.model, run.train.dtype, run.quantize)
        if self._loaded.get(device, (None,))[0] != key:
            self._loaded.pop(device, None)  # before the next one needs its memory
            with jax.default_device(device):
                model = load_model(run.model, run.train.dtype, quantize=run.quantize)
            self._loaded[device] = key, model
        return self._loaded[device][1]


def _write(
    workdir: Path, base: RunConfig, rows: Sequence[Row], total: int, env: Mapping[str, Any]
) -> None:
    """Writes rows.json and rows.md."""
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("run", *_ORIGIN))
    table, origin = markdown_table(rows, list(columns)), origin_line(env)
    page = f"# {workdir.resolve().name}\n\n{table}\n\n{len(rows)} of {total} runs. {origin}\n"
    write_result(workdir / "rows", {"rows": rows, "base": to_dict(base), "environment": env}, page)
