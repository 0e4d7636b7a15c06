"""Settings that decide a run's results: the one answer to "is this the same run?", for a run that
is resumed and for a run that a sweep has a record of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import flatten
from zflora_jax.data.mixture import has_own_rows, parse_mixture

# Settings that change what is logged, kept or evaluated, but nothing of the training itself: a
# resumed run may change them.
FREE = (
    "eval",
    "mesh",
    *(
        f"train/{name}"
        for name in ("log_every", "eval_every", "save_every", "max_to_keep", "keep_best")
    ),
    "train/report_to",
)

# Settings that change only rounding, memory or speed: a resumed run may change them too, which is
# logged, and a finished one counts with any of them.
ROUNDING = ("train/remat", "train/loss_chunk", "train/matmul_precision", "data/grad_accum_steps")


def settings(run: RunConfig) -> dict[str, Any]:
    """Every setting of `run`: name ("train/steps") -> value; adapter.init by name where it is left
    to the method.
    """
    return flatten(to_dict(replace(run, adapter=run.adapter.explicit())))


def differences(there: RunConfig, run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ: name -> (its value in `there`, in `run`)."""
    old, new = settings(there), settings(run)
    return {key: (old[key], new[key]) for key in old if old[key] != new[key]}


def same_numbers(there: RunConfig, run: RunConfig) -> bool:
    """Whether two runs have the same results, held-out losses among them, up to the rounding of
    another mesh or of other settings in `ROUNDING`.

    The place of a known task's files does not matter. The directory of the user's own rows does,
    because only it says which rows are read.
    """

    def matters(key: str) -> bool:
        if key == "data/data_dir":
            return not same_files(there, run)
        if key == "data/grad_accum_steps" and run.adapter.dropout:  # drawn for each micro-batch
            return True
        return key.startswith("eval/") or not key.startswith((*FREE, *ROUNDING))

    return not any(map(matters, differences(there, run)))


def same_files(there: RunConfig, run: RunConfig, tasks: Iterable[str] | None = None) -> bool:
    """Whether two data.data_dir can only hold the same rows of `tasks` (None: those that `run`
    trains on): rows of known tasks, or one place.
    """
    names = parse_mixture(run.data.task)[0] if tasks is None else tasks
    places = (one.data.data_dir for one in (there, run))
    old, new = (path and Path(path).expanduser().resolve() for path in places)
    return not has_own_rows(names) or old == new


def rounded_as(there: RunConfig, run: RunConfig) -> RunConfig:
    """`run` with the settings in `ROUNDING` taken from `there`, as far as its mesh allows."""
    values = settings(there)
    for key in ROUNDING:
        with contextlib.suppress(ConfigError):  # micro-batches that another mesh does not divide
            run = override(run, {key.replace("/", "."): values[key]})
    return run
