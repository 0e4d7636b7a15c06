"""Sweeps over any settings: one run per combination, one row per run, failures among them;
resumable, side by side where there are devices.

`compare` compares methods at rates chosen on validation, with tables for publication; this is the
plain form, for notebooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import queue
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from zflora_jax.core.fields import ConfigError, override, require, to_dict
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig, from_file
from zflora_jax.data.dates import dated
from zflora_jax.experiments.base import as_base
from zflora_jax.experiments.train import Trained, train
from zflora_jax.hf.keys import CheckpointError
from zflora_jax.hf.load import load_model
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.parallel.distributed import Preempted, StopSignals
from zflora_jax.reporting.files import atomic_write, local_path, plain, write_json
from zflora_jax.reporting.metrics import METRICS_FILE
from zflora_jax.reporting.plots import training_curves
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table
from zflora_jax.training.trainer import NonFiniteError

if TYPE_CHECKING:
    from pandas import DataFrame

log = logging.getLogger(__name__)

Row = dict[str, Any]
Settings = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
Extra = Callable[[RunConfig, Trained], Mapping[str, Any]]
RECORD = "row.json"
FINISHED = "finished"
_KEPT = (
    "params_trainable",
    "validation_loss",
    "test_loss",
    "steps",
    "seconds",
    "first_step_seconds",
    "data_wait_share",
)
_ORIGIN = ("commit", "dirty", "device", "jax", "date")


@dataclasses.dataclass(frozen=True)
class Grid:
    """What `zflora sweep --config` runs where get_sweep() returns one. name: of its page. settings:
    as `combinations` takes them.
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
    """`run_grid` as a pandas DataFrame, a row per run. ConfigError where pandas is not
    installed.
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
    """(name, changes) of every run: the product of a table of lists, or a list of tables as it is.
    Settings are dotted: "adapter.rank".

    ConfigError for a setting that does not exist, an empty list, and combinations given twice.
    """
    if isinstance(grid, Mapping):
        empty = [
            key
            for key, values in grid.items()
            if isinstance(values, str) or not hasattr(values, "__len__") or len(values) == 0
        ]
        require(not empty, f"grid[{(empty or [''])[0]!r}]: give a list of at least one value.")
        every = [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]
    else:
        every = [dict(changes) for changes in grid]
    require(bool(every), "the grid is empty: give at least one combination of settings.")
    every = [plain(changes) for changes in every]  # numpy's numbers too
    known = _flat(to_dict(base))
    wrong = sorted({key for changes in every for key in changes if key not in known})
    inner = [key for key in known if wrong and key.startswith(f"{wrong[0]}.")]
    require(
        not inner,
        f"{(wrong or [''])[0]!r} is a group of settings, not one; give e.g."
        f" {(inner or [''])[0]!r}.",
    )
    if wrong:
        override(base, {wrong[0]: "0"})  # says what is near
    named = [(_name(changes), changes) for changes in every]
    twice = sorted({name for name, _ in named if sum(name == other for other, _ in named) > 1})
    require(not twice, f"the grid has {twice[:1]} twice; each combination runs once.")
    return named


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
    """Train every combination of `grid` (see `combinations`) in <workdir>/<its name>; a row each,
    in their order.

    A row: run (its name), the settings that the grid changes, status ("finished", or "failed:
    why"), params_trainable, the held-out loss (validation_loss or test_loss, as eval.split says),
    steps, seconds, what `extra` adds, and where it ran (commit, device, ...). Failed are settings
    or models that cannot be used, other settings than the run in that place had, a loss that is not
    a number, and memory that does not suffice.

    Finished runs are not run again, nor those whose loss was no number; what was stopped goes on. A
    run under <workdir> that had other settings is refused. parallel: how many at one time, each on
    its own devices (as many as its mesh has); None: as many as fit on the devices there are. A
    signal stops what trains after its step, saved. <workdir>/rows.json and rows.md are written
    after every run, and with `page` its Markdown and JSON; <workdir>/curves at the end. Compiled
    programs are shared through <workdir>/compile_cache.
    """
    workdir, runs = local_path(workdir, "workdir"), combinations(base, grid)
    size = base.mesh.data * base.mesh.fsdp * base.mesh.tensor
    if any(key.startswith("mesh.") for _, changes in runs for key in changes):
        size = jax.device_count()  # meshes that differ take turns
    slots = [
        jax.devices()[i : i + size] for i in range(0, jax.device_count() - size + 1, size)
    ] or [jax.devices()]
    require(
        parallel is None or 1 <= parallel <= len(slots),
        f"parallel={parallel}: must be within 1..{len(slots)}, for runs of {size} devices.",
    )
    free: queue.SimpleQueue[list[jax.Device]] = queue.SimpleQueue()
    for devices in slots[: parallel or len(slots)]:
        free.put(devices)
    alone, env, bases = free.qsize() == 1, environment(), _Bases()
    rows: dict[str, Row] = {}

    def one(entry: tuple[str, dict[str, Any]]) -> Row:
        name, changes = entry
        devices = free.get()
        try:
            row = (
                {"run": name}
                | changes
                | _run(base, changes, workdir / name, bases, devices, extra, console and alone)
            )
        finally:
            free.put(devices)
        log.info("%s: %s", name, row["status"])
        return row

    with compile_cache(workdir / "compile_cache"):
        for row in _each(one, runs, alone, free.qsize()):
            rows[row["run"]] = row
            done = [rows[name] for name, _ in runs if name in rows]
            for path in (workdir / "rows.md", *([page] if page else [])):
                write_json(
                    path.with_suffix(".json"),
                    {"rows": done, "base": to_dict(base), "environment": env},
                )
                atomic_write(path, _page(done, len(runs), env).encode())
    curves = {
        name: workdir / name / METRICS_FILE
        for name, _ in runs
        if (workdir / name / METRICS_FILE).is_file()
    }
    with contextlib.suppress(ValueError):  # no run came to its first number
        training_curves(curves, workdir / "curves", f"{workdir.resolve().name}: {len(curves)} runs")
    return [rows[name] for name, _ in runs]


def _each(
    one: Callable[[Any], Row], runs: Sequence[Any], alone: bool, workers: int
) -> Iterator[Row]:
    """`one` of each, in this thread (where signals are heard) unless there are several slots."""
    if alone:
        yield from map(one, runs)
        return
    with StopSignals(), ThreadPoolExecutor(workers) as pool:
        try:
            for done in as_completed([pool.submit(one, entry) for entry in runs]):
                yield done.result()
        except (
            BaseException
        ):  # a signal, or a fault of ours: what runs is saved or ends, the rest is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(
    base: RunConfig,
    changes: dict[str, Any],
    workdir: Path,
    bases: _Bases,
    devices: Sequence[Any],
    extra: Extra | None,
    console: bool,
) -> Row:
    try:
        run = override(base, changes)
        # No older run, of another start, is taken for it.
        run = dataclasses.replace(run, adapter=run.adapter.explicit())
        if (saved := _saved(workdir / RECORD, run)) is not None:
            return saved
        trained = train(
            run, workdir, model=bases.of(run, devices), devices=devices, console=console
        )
        row: Row = {"status": FINISHED} | {
            key: trained.report[key] for key in _KEPT if key in trained.report
        }
        row |= dict(extra(dated(run, trained.date), trained)) if extra else {}
        row |= {key: trained.report["environment"][key] for key in _ORIGIN}
    except Preempted:
        raise
    except (
        ConfigError,
        CheckpointError,
        NonFiniteError,
        jax.errors.JaxRuntimeError,
        MemoryError,
    ) as error:  # XLA's, of memory too, are JaxRuntimeErrors
        row = {"status": f"failed: {error}" if str(error) else f"failed: {type(error).__name__}"}
        if isinstance(error, NonFiniteError):
            write_json(workdir / RECORD, {"config": to_dict(run), "row": row})
        return row
    write_json(workdir / RECORD, {"config": to_dict(run), "row": row})
    return row


class _Bases:
    """The base model that a device has: loaded once for all runs in a row that share it."""

    def __init__(self) -> None:
        self._loaded: dict[Any, tuple[tuple[str, str], Model]] = {}

    def of(self, run: RunConfig, devices: Sequence[Any]) -> Model | None:
        """None where several devices share the base: then each run loads its slices."""
        if len(devices) > 1:
            return None
        [device], key = devices, (run.model, run.train.dtype)
        if self._loaded.get(device, (None,))[0] != key:
            self._loaded.pop(device, None)  # before the next one needs its memory
            with jax.default_device(device):
                self._loaded[device] = key, load_model(run.model, dtype=run.train.dtype)
        return as_base(run, self._loaded[device][1])


def _saved(path: Path, run: RunConfig) -> Row | None:
    """The row of a run with these very settings, if it is there."""
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    try:
        found = from_file(RunConfig, saved["config"])
        return (
            saved["row"]
            if dataclasses.replace(found, adapter=found.adapter.explicit()) == run
            else None
        )
    except ConfigError:  # a setting that is gone
        return None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


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


def _page(rows: Sequence[Row], total: int, env: Row) -> str:
    shown = [
        {
            key: value
            for key, value in row.items()
            if key not in ("run", *_ORIGIN, "data_wait_share")
        }
        for row in rows
    ]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    at = {
        f"{row['commit']}{' with local changes' if row['dirty'] else ''}, {row['device']}"
        for row in rows
        if "commit" in row
    }
    lines = [
        markdown_table(shown, columns),
        "",
        f"{len(rows)} of {total} runs; run at {'; '.join(sorted(at)) or 'nothing yet'}.",
        "",
        origin_line(env),
    ]
    return "\n".join([*lines, ""])
