"""Settings that decide a run's results: the one answer to "is this the same run?", for resumed runs
and for records of a sweep.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import flatten
from zflora_jax.data.mixture import has_own_rows, parse_mixture
from zflora_jax.parallel.distributed import require_equal

# Settings that change logs, kept files or evaluation, but not the training itself. Instead of
# train.epochs, the resulting steps are compared.
FREE = (
    *("eval", "mesh", "train/log_every", "train/eval_every", "train/save_every"),
    *("train/max_to_keep", "train/keep_best", "train/report_to", "train/profile", "train/epochs"),
)

# Settings that change only rounding, memory or speed. A finished run counts with any of them.
ROUNDING = (
    *("train/remat", "train/scan_layers", "train/loss_chunk", "train/matmul_precision"),
    "data/grad_accum_steps",
)


def settings(run: RunConfig) -> dict[str, Any]:
    """Every setting of `run`, with adapter.init resolved: name ("train/steps") -> value."""
    return flatten(to_dict(replace(run, adapter=run.adapter.explicit())))


def require_same_settings(run: RunConfig) -> None:
    """Raises ConfigError in all processes of a run unless they have the same settings. Paths may
    differ: the files read from them are compared.
    """
    found = {key.replace("/", "."): value for key, value in settings(run).items()}
    require_equal({key: x for key, x in found.items() if key not in ("model", "data.data_dir")})


def differences(there: RunConfig, run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ: name -> (its value in `there`, in `run`)."""
    old, new = settings(there), settings(run)
    return {key: (old[key], new[key]) for key in old if old[key] != new[key]}


def decides(key: str, there: RunConfig, run: RunConfig) -> bool:
    """True if a setting in which two runs differ changes the training by more than rounding.

    The place of a known task's files does not. The directory of the user's rows does, because only
    it says which rows are read.
    """
    if key == "data/data_dir":
        old, new = (
            x and Path(x).expanduser().resolve() for x in (there.data.data_dir, run.data.data_dir)
        )
        return has_own_rows(parse_mixture(run.data.task)[0]) and old != new
    if key in ("data/grad_accum_steps", "train/scan_layers"):
        return run.adapter.dropout > 0  # drawn for each micro-batch and layer
    return not key.startswith((*FREE, *ROUNDING))


def same_numbers(there: RunConfig, run: RunConfig) -> bool:
    """True if two runs have the same results, held-out losses included, up to the rounding of
    another mesh or of other settings in `ROUNDING`.
    """
    changed = differences(there, run)
    return not any(key.startswith("eval/") or decides(key, there, run) for key in changed)


def counted_as(there: RunConfig, run: RunConfig) -> RunConfig:
    """`run` with the steps of `there`, if both derive them from the same train.epochs."""
    if run.train.steps is not None or run.train.epochs != there.train.epochs:
        return run
    return replace(run, train=replace(run.train, steps=there.train.steps))


def rounded_as(there: RunConfig, run: RunConfig) -> RunConfig:
    """`run` with the settings in `ROUNDING` from `there`, as far as its mesh allows."""
    values = settings(there)
    for key in ROUNDING:
        with contextlib.suppress(ConfigError):  # micro-batches that another mesh does not divide
            run = override(run, {key.replace("/", "."): values[key]})
    return run
