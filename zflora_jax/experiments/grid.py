"""Grids: a run and a row per combination of settings, failures among them; for notebooks and
ablations.

`compare` compares methods at rates chosen on validation, with tables for publication.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from zflora_jax.core.fields import ConfigError, override, require, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.base import as_base
from zflora_jax.experiments.jobs import FAILURES, Devices, run_jobs
from zflora_jax.experiments.page import grid_page, write_page
from zflora_jax.experiments.store import EXTRA, Extra, Job, Result, model_digest, status
from zflora_jax.hf.load import load_model
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.reporting.files import local_path, plain
from zflora_jax.reporting.metrics import METRICS_FILE
from zflora_jax.reporting.plots import training_curves
from zflora_jax.reporting.provenance import environment
from zflora_jax.training.identity import settings as settings_of

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

Row = dict[str, Any]
Settings = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
RECORD = "row.json"
# What a result holds beside the columns of its row.
_NOT_IN_ROWS = (
    "failed",
    "train_rows",
    "train_rows_dropped",
    "train_documents_cut",
    "cpu_count",
    EXTRA,
)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid that `zflora sweep --config` runs where get_sweep() returns one.

    Attributes:
      name: of its page.
      base: the settings that every run shares.
      settings: what changes, as `combinations` takes it.
    """

    name: str
    base: RunConfig
    settings: Settings


def sweep(
    base: RunConfig,
    grid: Settings,
    workdir: str | Path,
    *,
    extra: Extra | None = None,
    parallel: int | None = None,
    console: bool = False,
) -> DataFrame:
    """`run_grid` as a pandas DataFrame, a row per run.

    Args:
      base: as the other arguments, see `run_grid`.

    Raises:
      ConfigError: pandas is not installed; or as for `run_grid`.
    """
    try:
        import pandas
    except ImportError:
        raise ConfigError(
            "sweep returns a pandas DataFrame: pip install pandas, or call"
            " zflora_jax.experiments.grid.run_grid for plain rows."
        ) from None
    return pandas.DataFrame(
        run_grid(base, grid, workdir, extra=extra, parallel=parallel, console=console)
    )


def combinations(base: RunConfig, grid: Settings) -> list[tuple[str, dict[str, Any]]]:
    """The runs of a grid.

    Args:
      base: the settings that they share.
      grid: a table of lists, of which every combination is a run, or a list of tables, each a run.
        Settings are dotted: "adapter.rank".

    Returns:
      (name, changes) of every run.

    Raises:
      ConfigError: a setting that does not exist, an empty list, or a combination given twice.
    """
    every = [plain(changes) for changes in _tables(grid)]  # numpy's numbers too
    known = [key.replace("/", ".") for key in settings_of(base)]
    wrong = sorted({key for changes in every for key in changes if key not in known})
    inner = [key for key in known if wrong and key.startswith(f"{wrong[0]}.")]
    if inner:
        raise ConfigError(f"{wrong[0]!r} is a group of settings, not one; give e.g. {inner[0]!r}.")
    if wrong:
        override(base, {wrong[0]: "0"})  # says what is near
    named = [(_name(changes), changes) for changes in every]
    twice = sorted({name for name, _ in named if sum(name == other for other, _ in named) > 1})
    require(not twice, f"the grid has {twice[:1]} twice; each combination runs once.")
    return named


def _tables(grid: Settings) -> list[dict[str, Any]]:
    if isinstance(grid, Mapping):
        empty = [
            key
            for key, values in grid.items()
            if isinstance(values, str) or not hasattr(values, "__len__") or len(values) == 0
        ]
        if empty:
            raise ConfigError(f"grid[{empty[0]!r}]: give a list of at least one value.")
        return [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
    require(len(grid) > 0, "the grid is empty: give at least one combination of settings.")
    return [dict(changes) for changes in grid]


def _name(changes: Mapping[str, Any]) -> str:
    """A directory's name that says what was changed; of what is too long, its beginning and a
    hash.
    """
    text = ",".join(f"{key}={value}" for key, value in changes.items()) or "base"
    safe = re.sub(r"[^\w.,=+-]", "_", text)
    return (
        safe
        if safe == text and len(safe) <= 120
        else f"{safe[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )


def run_grid(
    base: RunConfig,
    grid: Settings,
    workdir: str | Path,
    *,
    extra: Extra | None = None,
    parallel: int | None = None,
    page: Path | None = None,
    console: bool = True,
) -> list[Row]:
    """Train every combination of `grid` in <workdir>/<its name>.

    Finished runs are not run again, nor those whose loss was no number; what was stopped goes on. A
    run under <workdir> that had other settings is refused. A signal stops what trains after its
    step, saved. A run that another process trains is waited for. <workdir>/rows.json and rows.md
    are written after every run, <workdir>/curves at the end; <workdir>/compile_cache is shared.

    Args:
      base: the settings that the runs share.
      grid: what changes, as `combinations` takes it.
      workdir: of the runs.
      extra: (settings, what was trained) -> columns of its row, before others of the same names.
      parallel: how many run at one time, each on the devices of its mesh; None: all that fit.
      page: a second place of the page: this Markdown file, and its JSON.
      console: whether a run that is alone shows its progress.

    Returns:
      a row per run, in the order of `combinations`: run (its name), the settings that the grid
      changes, status ("finished", or "failed: why"), params_trainable, the held-out loss
      (validation_loss or test_loss, as eval.split says), steps, seconds, where it ran (commit,
      device, ...), and what `extra` returned. Failed are settings or models that cannot be used,
      other settings than the run in that place had, a loss that is no number, and too much memory.

    Raises:
      ConfigError: as for `combinations`, or `parallel` is more than fits.
      Preempted: a signal came.
    """
    workdir, named = local_path(workdir, "workdir"), combinations(base, grid)
    slots, env, bases = _slots(base, named, parallel), environment(), _Bases()
    jobs, results = _jobs(base, named, workdir, extra)
    title = page.stem if page else workdir.resolve().name

    def rows() -> list[Row]:
        return [_row(name, changes, results[name]) for name, changes in named if name in results]

    def write() -> None:
        values = {"rows": rows(), "base": to_dict(base), "environment": env}
        for path in (workdir / "rows.md", *([page] if page else [])):
            write_page(path, grid_page(title, rows(), len(named), env), values)

    with compile_cache(workdir / "compile_cache"):
        if results:
            write()
        settings: Any = {"loaded": bases.digests, "failures": FAILURES, "console": console}
        for job, result in run_jobs(jobs, bases.of, slots, **settings):
            results[job.name] = result
            log.info("%s: %s", job.name, status(result))
            write()
    _draw(workdir, [name for name, _ in named])
    return rows()


def _slots(
    base: RunConfig, named: Sequence[tuple[str, Mapping[str, Any]]], parallel: int | None
) -> list[Devices]:
    """The devices of each run that goes on at one time."""
    size, count = base.mesh.devices, jax.device_count()
    if any(key.startswith("mesh.") for _, changes in named for key in changes):
        size = count  # meshes that differ take turns
    slots: list[Devices] = [
        jax.devices()[i : i + size] for i in range(0, count - size + 1, size)
    ] or [jax.devices()]
    require(
        parallel is None or 1 <= parallel <= len(slots),
        f"parallel={parallel}: must be within 1..{len(slots)}, for runs of {size} devices.",
    )
    return slots[: parallel or len(slots)]


def _jobs(
    base: RunConfig,
    named: Sequence[tuple[str, dict[str, Any]]],
    workdir: Path,
    extra: Extra | None,
) -> tuple[list[Job], dict[str, Result]]:
    """The runs that can be tried, and the results of those whose settings are refused."""
    jobs, refused = [], {}
    for name, changes in named:
        try:
            run = override(base, changes)
        except ConfigError as error:
            refused[name] = {"failed": str(error)}
            log.info("%s: %s", name, status(refused[name]))
            continue
        # No older run, of another start, is taken for it.
        run = dataclasses.replace(run, adapter=run.adapter.explicit())
        jobs.append(Job(name, run, workdir / name, workdir / name / RECORD, extra=extra))
    return jobs, refused


def _row(name: str, changes: Mapping[str, Any], result: Result) -> Row:
    measured = {key: value for key, value in result.items() if key not in _NOT_IN_ROWS}
    return {"run": name, **changes, "status": status(result), **measured, **result.get(EXTRA, {})}


def _draw(workdir: Path, names: Sequence[str]) -> None:
    curves = {name: path for name in names if (path := workdir / name / METRICS_FILE).is_file()}
    with contextlib.suppress(ValueError):  # no run came to its first number
        training_curves(curves, workdir / "curves", f"{workdir.resolve().name}: {len(curves)} runs")


class _Bases:
    """The base model that a device has: loaded once for all runs in a row that share it."""

    def __init__(self) -> None:
        self._loaded: dict[Any, tuple[Any, Model]] = {}
        self.digests: dict[str, str | None] = {}  # of their files, before they were loaded

    def of(self, run: RunConfig, devices: Devices) -> Model | None:
        """None where several devices share the base: then each run loads its slices."""
        if devices is None or len(devices) > 1:
            return None
        [device], key = devices, (run.model, run.train.dtype, run.quantize)
        if self._loaded.get(device, (None,))[0] != key:
            self._loaded.pop(device, None)  # before the next one needs its memory
            self.digests[run.model] = model_digest(run.model)
            with jax.default_device(device):
                self._loaded[device] = (
                    key,
                    load_model(run.model, run.train.dtype, quantize=run.quantize),
                )
        return as_base(run, self._loaded[device][1])
