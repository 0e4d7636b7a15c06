"""A run's directory: its settings (config.json), its starts (starts.jsonl), its lock.

config.json is written before the first step, and a run resumes only with settings that agree with
it (`adopt`). Saved states: checkpoints/, see `checkpoint`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError, from_dict, require, to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path, output_path
from zflora_jax.core.textfile import lines_of
from zflora_jax.data.dates import dated
from zflora_jax.reporting.files import atomic_write, plain, write_json
from zflora_jax.reporting.metrics import METRICS_FILE
from zflora_jax.training.identity import counted_as, decides, differences, rounded_as
from zflora_jax.training.lock import locked

STARTS_FILE = "starts.jsonl"
REPORT_FILE = "report.json"
CHECKPOINTS = "checkpoints"  # a folder per saved step in it, see `checkpoint`
META = "meta.json"  # in such a folder; makes it count

Changes = dict[str, tuple[Any, Any]]  # a setting's dotted name -> (old value, new value)


# --- config.json and the settings that a resumed run may change -----------------------------------


def read_config(workdir: str | Path) -> RunConfig:
    """The settings of the run in `workdir`; ConfigError without one, or if they are damaged."""
    path = as_path(workdir, "workdir") / "config.json"
    require(
        path.is_file(),
        f"{workdir} holds no run (no config.json in it). Give the --workdir of a training run, or"
        " --model for a model directory.",
    )
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); restore it from a copy, or start a new run in"
            " another directory."
        ) from None
    require(
        not isinstance(values, dict) or "model_type" not in values,
        f"{workdir} holds a model, not a training run. Give the --workdir of a run; `zflora eval`"
        " and `zflora generate` take a model by --model.",
    )
    return from_dict(RunConfig, values)


def adopt(workdir: str | Path, run: RunConfig) -> tuple[RunConfig, Changes]:
    """Decides the settings with which `run` starts or resumes in `workdir`.

    A new run gets today's date. A resumed one gets data.date, adapter.init and the steps of
    train.epochs from the run that is there, if it leaves them open (None). Until a step is saved,
    every setting may change. A finished run keeps all settings that its results were computed
    with, except for micro-batches that another mesh does not divide.

    Returns:
      (The settings to use, those that differ from the run that is there.)

    Raises:
      ConfigError: `run` changes settings that must stay, or `workdir` cannot be written.
    """
    workdir = output_path(workdir, "workdir", folder=True)
    if not (workdir / "config.json").is_file():
        made = (CHECKPOINTS, METRICS_FILE, REPORT_FILE, STARTS_FILE)  # after config.json
        kept = ", ".join(name for name in made if (workdir / name).exists())
        require(
            not kept,
            f"{workdir} has {kept} but no config.json, so their run is unknown."
            " Use another --workdir.",
        )
        return dated(run), {}
    there = read_config(workdir)
    run = dated(run, there.data.date)
    there = dated(there, run.data.date)
    if run.adapter.init is None and run.adapter.method == there.adapter.method:
        run = replace(run, adapter=run.adapter.replace(init=there.adapter.init))
    saved = saved_steps(workdir)
    run = counted_as(there, run) if saved else run
    if run.train.steps is None:
        return run, {}  # to be adopted when its rows are counted
    if saved:
        _require_may_change(workdir, there, run, saved[-1])
        if run.steps <= saved[-1]:  # nothing is left to train with other settings
            run = rounded_as(there, run)
    changed = differences(there, run)
    return run, {key.replace("/", "."): values for key, values in changed.items()}


def _require_may_change(workdir: Path, there: RunConfig, run: RunConfig, finished: int) -> None:
    """Raises ConfigError if settings change that must stay once `finished` steps are done."""
    changed = differences(there, run)
    left, constant = run.steps > finished, run.optim.schedule == "constant"
    refused = {key for key in changed if decides(key, there, run)}
    # Unless the rate is constant, a run that ends early has not decayed to its low rate.
    if run.steps >= (finished if constant else there.steps):
        refused.discard("train/steps")
    if not left:
        refused.discard("data/grad_accum_steps")
    elif run.train.keep_best:  # losses of other rows are not comparable
        refused |= {"eval/limit", "eval/split"} & changed.keys()
    if refused:
        rows = [
            f"  {key.replace('/', '.')}: {old!r} there, {new!r} now"
            for key, (old, new) in changed.items()
            if key in refused
        ]
        raise ConfigError(
            "\n".join([f"{workdir} holds a run with another config:", *rows])
            + f"\n  ({finished} of {there.steps} steps are finished there.)"
            "\nUse another --workdir, or the same settings to resume it."
        )


def require_no_jump(workdir: str | Path, run: RunConfig) -> None:
    """Raises ConfigError if `run` would lengthen a run whose learning rate has decayed. Its results
    would not be those of a run of that length, which a sweep compares it with.
    """
    if run.optim.schedule == "constant" or not (saved := saved_steps(workdir)):
        return
    there = read_config(workdir)
    steps = counted_as(there, run).train.steps
    require(
        steps is not None and steps <= there.steps,  # `adopt` decides about fewer
        f"{workdir} holds a run of {there.steps} steps, of which {saved[-1]} are done, and this"
        f" one has train.steps={steps}, train.epochs={run.train.epochs}: its learning rate would"
        f" jump at step {saved[-1]}. Give the sweep another workdir.",
    )


def saved_steps(workdir: str | Path) -> list[int]:
    """The numbers of the steps whose state is saved in `workdir`, in increasing order."""
    found = (as_path(workdir, "workdir") / CHECKPOINTS).glob(f"*/{META}")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


# --- who may write --------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(workdir: str | Path, run: RunConfig) -> Iterator[Callable[[], None]]:
    """Locks `workdir` for `run` until the block ends. Writes its config.json if no step is saved
    yet; otherwise `keep_settings` does, once the saved state has been read.

    Yields:
      The function of `lock.locked`.

    Raises:
      BusyError: Another process is training there.
      ConfigError: The run there cannot resume with these settings, or `workdir` cannot be written.
    """
    workdir = as_path(workdir, "workdir")
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(locked(workdir))
            adopt(workdir, run)  # another process may have begun since this one looked
            if not saved_steps(workdir):
                keep_settings(workdir, run)
        except OSError as error:
            raise ConfigError(
                f"cannot write to workdir {workdir}: {error.strerror or error}. Choose a directory"
                " that you may write to."
            ) from None
        yield held


def keep_settings(workdir: Path, run: RunConfig, held: Callable[[], None] = lambda: None) -> None:
    """Writes config.json, the settings of the resumed run. held: The function `claimed` yields."""
    held()
    write_json(workdir / "config.json", to_dict(run))


# --- starts.jsonl ---------------------------------------------------------------------------------


def record_start(workdir: str | Path, step: int, env: Mapping[str, Any], **more: Any) -> None:
    """Appends a line to <workdir>/starts.jsonl: the number of finished steps, `env` from
    `provenance.environment`, and the entries of `more` that are not empty.
    """
    path = as_path(workdir) / STARTS_FILE
    earlier = path.read_bytes() if path.is_file() else b""
    line = {"step": step} | dict(env) | {name: value for name, value in more.items() if value}
    atomic_write(path, earlier + json.dumps(plain(line)).encode() + b"\n")


def read_starts(workdir: str | Path) -> list[dict[str, Any]]:
    """The starts of a run, in order. Damaged lines are left out; without a file there are none."""
    path, found = as_path(workdir) / STARTS_FILE, list[dict[str, Any]]()
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    for line in lines_of(text):
        with contextlib.suppress(ValueError):
            start = json.loads(line)
            found += [start] if isinstance(start, dict) else []
    return found
