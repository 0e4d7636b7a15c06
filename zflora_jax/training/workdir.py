"""A run's directory: its settings (config.json), its starts (starts.jsonl), and who may write.

config.json is written before the first step, and a run goes on only with settings that agree with
it (`adopt`). The saved states are in checkpoints/, see `checkpoint`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError, from_dict, require, to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path
from zflora_jax.core.textfile import lines_of
from zflora_jax.data.dates import dated
from zflora_jax.reporting.files import atomic_write, plain, write_json
from zflora_jax.training.identity import FREE, ROUNDING, differences, rounded_as, same_files
from zflora_jax.training.lock import locked

STARTS_FILE = "starts.jsonl"
REPORT_FILE = "report.json"
CHECKPOINTS = "checkpoints"  # a folder per saved step in it, see `checkpoint`
META = "meta.json"  # in such a folder; makes it count

Changes = dict[str, tuple[Any, Any]]  # a setting's dotted name -> (what it was, what it is now)


# --- config.json and what a resumed run may change ------------------------------------------------


def read_config(workdir: str | Path) -> RunConfig:
    """The settings of the run in `workdir`.

    Raises:
      ConfigError: `workdir` holds no run, or its config.json is damaged.
    """
    path = as_path(workdir, "workdir") / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{workdir} holds no run (no config.json in it). Give the --workdir of a training run,"
            " or --model for a model directory."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); restore it from a copy, or start a new run in"
            " another directory."
        ) from None
    if isinstance(values, dict) and "model_type" in values:
        raise ConfigError(
            f"{workdir} holds a model, not a training run: give it with --model (zf.load_model)."
        )
    return from_dict(RunConfig, values)


def adopt(workdir: str | Path, run: RunConfig) -> tuple[RunConfig, Changes]:
    """Decide with which settings `run` starts or goes on in `workdir`.

    If `run` leaves data.date or adapter.init open (None), it takes the value of the run that is
    there. A new run takes today's date.

    As long as no step is saved, every setting may change. A finished run keeps all settings that
    its numbers were computed with, but for micro-batches that another mesh does not divide.

    Returns:
      (the settings to use, those that differ from the run that is there).

    Raises:
      ConfigError: `run` changes settings that must stay (the message names all of them), or asks
        for fewer steps than are finished, or at a rate that falls than the run there.
    """
    workdir = as_path(workdir, "workdir")
    if not (workdir / "config.json").is_file():
        unclear = (
            f"{workdir} has checkpoints but no config.json, so it is unclear what they belong to."
            " Use another --workdir."
        )
        require(not (workdir / CHECKPOINTS).exists(), unclear)
        return dated(run), {}
    there = read_config(workdir)
    run = dated(run, there.data.date)
    if run.adapter.init is None and run.adapter.method == there.adapter.method:
        run = replace(run, adapter=run.adapter.replace(init=there.adapter.init))
    changed = differences(dated(there, run.data.date), run)
    finished = max(saved_steps(workdir), default=0)
    if finished:
        _require_may_change(workdir, there, run, changed, finished)
    if finished and run.train.steps <= finished:  # nothing is left to train with other settings
        run = rounded_as(there, run)
        changed = differences(dated(there, run.data.date), run)
    return run, {key.replace("/", "."): values for key, values in changed.items()}


def _require_may_change(
    workdir: Path, there: RunConfig, run: RunConfig, changed: Changes, finished: int
) -> None:
    """Refuse changes of settings that must stay once `finished` steps are done."""
    # Fewer steps than asked for before: the learning rate did not decay to there.
    least = finished if run.optim.schedule == "constant" else there.train.steps
    longer = ("train/steps",) if run.train.steps >= least else ()
    moved = ("data/data_dir",) if same_files(there, run) else ()  # its rows are compared, too
    free = (*FREE, *ROUNDING, *longer, *moved)
    refused = [key for key in changed if not key.startswith(free)]
    left = run.train.steps > finished
    if run.adapter.dropout and left and "data/grad_accum_steps" in changed:
        refused.append("data/grad_accum_steps")  # dropout draws for each micro-batch
    if run.train.keep_best and left:  # losses of other rows are no measure
        refused += [key for key in ("eval/limit", "eval/split") if key in changed]
    if refused:
        rows = [
            f"  {key.replace('/', '.')}: {changed[key][0]!r} there, {changed[key][1]!r} now"
            for key in refused
        ]
        if "train/steps" in refused:
            shorter = f"; at fewer than {there.train.steps} the learning rate has not come down"
            rows.append(
                f"  ({finished} steps are finished there"
                f"{shorter if run.train.steps >= finished else ''})"
            )
        advice = "Use another --workdir, or the same settings to resume it."
        raise ConfigError("\n".join([f"{workdir} holds a run with another config:", *rows, advice]))


def require_no_jump(workdir: str | Path, run: RunConfig) -> None:
    """Refuse to make a longer run of one whose learning rate came down: its numbers would not be
    those of a run that was as long from the start, which a sweep compares it with.

    Args:
      workdir: where `run` is to begin or to go on.
      run: its settings.

    Raises:
      ConfigError: the run there has saved steps, was to have fewer than train.steps, and its rate
        falls.
    """
    if run.optim.schedule == "constant" or not (saved := saved_steps(workdir)):
        return
    there = read_config(workdir).train.steps
    require(
        run.train.steps <= there,  # fewer are left to `adopt`
        f"{workdir} holds a run of {there} steps, of which {saved[-1]} are done, and this one has"
        f" train.steps={run.train.steps}: its learning rate would jump at step {saved[-1]}. Give"
        " the sweep another workdir and out.",
    )


def saved_steps(workdir: str | Path) -> list[int]:
    """The numbers of the steps whose state is saved in `workdir`, in increasing order."""
    found = (as_path(workdir, "workdir") / CHECKPOINTS).glob(f"*/{META}")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


def change_notes(changed: Changes, run: RunConfig) -> list[str]:
    """Say how each changed setting affects the numbers of a resumed run, a sentence each. A setting
    that does not affect them gets no sentence.
    """
    notes = [
        f"{key}: {old!r} before, {new!r} from here on. Rounding, memory and speed may change,"
        " nothing else does."
        for key, (old, new) in changed.items()
        if key.replace(".", "/") in ROUNDING
    ]
    if "train.steps" in changed:
        old, new = changed["train.steps"]
        if run.optim.schedule == "constant":
            rate = (
                "The learning rate is constant: the run is the one that was asked for so many steps"
                " at once."
            )
        else:
            rate = (
                f"From here on the learning rate follows the {run.optim.schedule} schedule of {new}"
                " steps; it jumps to there."
            )
        notes.append(f"train.steps: {old} before, {new} from here on. {rate}")
    return notes


# --- who may write --------------------------------------------------------------------------------


def claim(workdir: str | Path, run: RunConfig) -> None:
    """Check that `run` may train in `workdir` (`adopt`), then write its config.json there.

    Raises:
      BusyError: another process is training there.
      ConfigError: the run there cannot go on with these settings, or `workdir` cannot be written.
    """
    adopt(workdir, run)
    workdir = as_path(workdir, "workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with locked(workdir):
            write_json(workdir / "config.json", to_dict(run))
    except OSError as error:
        raise ConfigError(
            f"cannot write to workdir {workdir}: {error.strerror or error}. Choose a directory"
            " that you may write to."
        ) from None


def require_own(workdir: str | Path, run: RunConfig) -> None:
    """Refuse a `workdir` that another process claimed after `run` did. Call it while holding the
    lock.

    Raises:
      ConfigError: its config.json is of another run.
    """
    require(
        read_config(workdir) == run,
        f"{workdir} was taken by a run of another config at the same moment. Use another"
        " --workdir.",
    )


# --- starts.jsonl ---------------------------------------------------------------------------------


def record_start(workdir: str | Path, step: int, env: Mapping[str, Any], **more: Any) -> None:
    """Append a line to <workdir>/starts.jsonl.

    Args:
      step: how many steps were finished at this start.
      env: of `provenance.environment`.
      more: further entries of the line; empty ones are left out.
    """
    path = as_path(workdir) / STARTS_FILE
    earlier = path.read_bytes() if path.is_file() else b""
    line = {"step": step} | dict(env) | {name: value for name, value in more.items() if value}
    atomic_write(path, earlier + json.dumps(plain(line)).encode() + b"\n")


def read_starts(workdir: str | Path) -> list[dict[str, Any]]:
    """The starts of a run, in order. Damaged lines are left out; without a file there are none."""
    path, found = as_path(workdir) / STARTS_FILE, list[dict[str, Any]]()
    if not path.is_file():
        return found
    for line in lines_of(path.read_bytes().decode("utf-8", errors="replace")):
        with contextlib.suppress(ValueError):
            start = json.loads(line)
            found += [start] if isinstance(start, dict) else []
    return found
