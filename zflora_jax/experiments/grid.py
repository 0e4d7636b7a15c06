"""Grids: a run and a row per combination of settings, also for runs that fail."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax import process_count
from jax.errors import JaxRuntimeError

from zflora_jax.core.adapter_config import OF_BASE
from zflora_jax.core.errors import CheckpointError, NonFiniteError, Preempted
from zflora_jax.core.fields import ConfigError, override, require, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.dates import dated
from zflora_jax.experiments.run_report import read_report
from zflora_jax.experiments.train import train
from zflora_jax.hf.load import load_model
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.parallel.sharding import make_mesh, shard
from zflora_jax.reporting.files import local_path, plain, write_result
from zflora_jax.reporting.metrics import METRICS_FILE
from zflora_jax.reporting.plots import loss_curves
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table
from zflora_jax.training.group import Group
from zflora_jax.training.identity import counted_as, same_numbers, settings as settings_of
from zflora_jax.training.lock import BusyError, locked
from zflora_jax.training.workdir import read_config, require_no_jump

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

Row = dict[str, Any]
Named = tuple[str, dict[str, Any]]  # a run's name, and the settings that the grid changes
Settings = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
FINISHED = "finished"
POLL = 5.0  # seconds between looks at runs that other processes are training
# Errors of one run that do not stop the others. XLA's are JaxRuntimeErrors, also out of memory.
_FAILURES = (ConfigError, CheckpointError, NonFiniteError, JaxRuntimeError, MemoryError)
_REPORTED = ("params_trainable", "steps", "seconds", "first_step_seconds", "together")
_ORIGIN = ("commit", "dirty", "date", "device", "cpu", "jax")


# Runs of one program can differ in these.
_OWN = ("train/seed", "data/seed", "data/task", "optim/learning_rate")


def sweep(
    base: RunConfig, grid: Settings, workdir: str | Path, *, console: bool = True, together: int = 1
) -> DataFrame:
    """Trains every combination of settings, each in <workdir>/<its name>.

    Finished runs are not trained again, stopped ones resume, failed ones are tried again. Several
    processes can share a workdir: each waits for runs that another one trains. <workdir>/rows.json
    and rows.md are written after every run, <workdir>/curves at the end; the runs share
    <workdir>/compile_cache.

    Args:
      base: Settings that the runs share.
      grid: A table of lists, whose combinations are the runs, or a list of tables, each a run.
        Names of settings are dotted: "adapter.rank".
      workdir: Directory of the runs.
      console: Whether the runs and their progress are shown.
      together: Number of runs that train at a time in one program. They have one bucket length, and
        differ only in seeds, learning rate and task. JAX's context managers do not reach them.

    Returns:
      A row per run, in the order of the grid: run (its name), the settings that the grid changes,
      status ("finished", or "failed: why"), params_trainable, the held-out loss (validation_loss or
      test_loss, by eval.split), steps, seconds, and the place of training (commit, device, ...). A
      run fails if its settings or model cannot be used, its directory holds a run of other
      settings, its loss is not finite, or it needs too much memory.

    Raises:
      ConfigError: pandas is not installed, the grid is wrong, or JAX has joined several processes.
      Preempted: A signal came; the run that was training has saved its last step.
    """
    try:
        import pandas
    except ImportError:
        raise ConfigError(
            "sweep returns a DataFrame: pip install pandas, or use `zflora sweep` (rows.json)."
        ) from None
    rows = run_grid(base, grid, workdir, console=console, together=together)
    return pandas.DataFrame(rows)


def combinations(base: RunConfig, grid: Settings) -> list[tuple[str, dict[str, Any]]]:
    """Returns (name, changes) of every run of a grid, see `sweep`.

    Raises:
      ConfigError: A setting does not exist, a list is empty, or a combination is given twice.
    """
    if isinstance(grid, Mapping):
        for key, values in grid.items():
            require(
                not isinstance(values, str) and hasattr(values, "__len__") and len(values) > 0,
                f"grid[{key!r}]: give a list of at least one value.",
            )
        tables = [dict(zip(grid, x, strict=True)) for x in itertools.product(*grid.values())]
    else:
        require(
            isinstance(grid, list | tuple) and all(isinstance(one, Mapping) for one in grid),
            f"the grid is {grid!r:.60}: give a table of lists, or a list of tables of settings.",
        )
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
    base: RunConfig, grid: Settings, workdir: str | Path, *, console: bool = True, together: int = 1
) -> list[Row]:
    """`sweep` as plain rows, without pandas."""
    require(together >= 1, f"together={together}: must be at least 1, the runs of one program.")
    require(
        process_count() == 1,
        f"a sweep runs in one process, and JAX has joined {process_count()} here: train its runs"
        " one by one (zf.train), or start processes that are not joined, which share the workdir.",
    )
    workdir, named, env = local_path(workdir, "workdir"), combinations(base, grid), environment()
    say: Callable[[str], None] = print if console else log.info
    names = [name for name, _ in named]
    done, bases = dict[str, Row](), dict[Any, Model]()  # the last run's, by what it depends on
    with compile_cache(workdir / "compile_cache"):
        while left := [(name, changes) for name, changes in named if name not in done]:
            for part in _parts(base, left, workdir, together):
                for name, _ in part:
                    say(f"run {names.index(name) + 1} of {len(named)}: {name}")
                for name, changes, found in _outcomes(base, part, workdir, bases, console):
                    done[name] = {"run": name, **changes, **found}
                    say(f"{name}: {found['status']}")
                    rows = [done[name] for name in names if name in done]
                    _write(workdir, base, rows, len(named), env)
            if len(done) < len(named):
                time.sleep(POLL)
    curves = {n: path for n in names if (path := workdir / n / METRICS_FILE).is_file()}
    with contextlib.suppress(ValueError):  # no run has logged a loss
        loss_curves(curves, workdir / "curves", f"{workdir.resolve().name}: {len(curves)} runs")
    return rows


def _parts(
    base: RunConfig, left: Sequence[Named], workdir: Path, together: int
) -> list[list[Named]]:
    """The runs that train at a time: at most `together` of one program."""
    programs: dict[str, list[Named]] = {}
    for name, changes in left:
        program = _program(base, changes, workdir / name) if together > 1 else None
        programs.setdefault(program or name, []).append((name, changes))
    found = programs.values()
    return [x[start : start + together] for x in found for start in range(0, len(x), together)]


def _program(base: RunConfig, changes: Mapping[str, Any], folder: Path) -> str | None:
    """Returns a key, equal for runs that can share a program; None if a run cannot, or is done."""
    try:
        run = override(base, changes)
        own_base = run.adapter.init in OF_BASE  # without the adapter's first values
        alone = own_base or run.train.profile or len(run.data.bucket_lengths) > 1
        if alone or _finished(run, folder):
            return None
    except ConfigError:  # it will be the run's row
        return None
    shared = {key: value for key, value in settings_of(run).items() if key not in _OWN}
    return repr((shared, run.data.task if run.train.steps is None else ""))  # steps of the epochs


def _outcomes(
    base: RunConfig, part: Sequence[Named], workdir: Path, bases: dict[Any, Model], console: bool
) -> Iterator[tuple[str, dict[str, Any], Row]]:
    """Yields (name, changes, the rest of its row) of the runs that no other process trains."""
    group = Group(len(part))

    def make(number: int) -> Row:
        name, changes = part[number]
        run, folder, shown = override(base, changes), workdir / name, console and number == 0
        return _finished(run, folder) or _train(run, folder, bases, shown, group)

    found, fault = group.each([partial(make, number) for number in range(len(part))]), None
    for (name, changes), outcome in zip(part, found, strict=True):
        if isinstance(outcome, BusyError):
            continue
        if isinstance(outcome, _FAILURES):
            yield name, changes, {"status": f"failed: {str(outcome) or type(outcome).__name__}"}
        elif isinstance(outcome, BaseException):
            fault = fault or outcome
        else:
            yield name, changes, outcome
    if fault is not None:
        raise fault


def _finished(run: RunConfig, folder: Path) -> Row | None:
    """The row of a run that is finished with these settings, from its report; else None."""
    if f"{run.eval.split}_loss" not in (report := read_report(folder) or {}):
        return None
    run = counted_as(there := read_config(folder), run)
    same = report["steps"] == run.train.steps and same_numbers(there, dated(run, there.data.date))
    return _row(run, report) if same else None


def _train(run: RunConfig, folder: Path, bases: dict[Any, Model], console: bool, group: Any) -> Row:
    """Trains a run, or resumes it, and returns its row."""
    if folder.is_dir():
        with locked(folder):  # raises BusyError before anything slow
            require_no_jump(folder, run)
    key = run.model, run.train.dtype, run.quantize, run.mesh
    if key not in bases:
        bases.clear()  # before the next one needs its memory
        bases[key] = _base(run)
    trained = train(run, folder, model=bases[key], console=console, group=group)
    if trained.signalled:
        raise Preempted(f"stopped by a signal; {folder} is saved, the same command resumes it.")
    return _row(run, trained.report)


def _base(run: RunConfig) -> Model:
    """The base of a run, placed as training places it, so that runs share its arrays."""
    mesh = make_mesh(run.mesh)
    model = load_model(run.model, run.train.dtype, mesh=mesh, quantize=run.quantize)
    return replace(model, params=shard(model.params, mesh))


def _row(run: RunConfig, report: Mapping[str, Any]) -> Row:
    """The columns of a finished run."""
    measured = {key: report[key] for key in (f"{run.eval.split}_loss", *_REPORTED) if key in report}
    origin = {key: report["environment"].get(key) for key in _ORIGIN}
    return {"status": FINISHED} | measured | origin


def _write(
    workdir: Path, base: RunConfig, rows: Sequence[Row], total: int, env: Mapping[str, Any]
) -> None:
    """Writes rows.json and rows.md."""
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("run", *_ORIGIN))
    table, origin = markdown_table(rows, list(columns)), origin_line(env)
    page = f"# {workdir.resolve().name}\n\n{table}\n\n{len(rows)} of {total} runs. {origin}\n"
    write_result(workdir / "rows", {"rows": rows, "base": to_dict(base), "environment": env}, page)
