"""Which settings decide a run's numbers: the one answer to "is this the same run?", for a run that
is resumed and for a run that a sweep has a record of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import ConfigError, to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import flatten
from zflora_jax.data.mixture import has_own_rows, parse_mixture

# Settings that change what is logged, kept or evaluated but no number of the training itself: a
# resumed run may change them.
FREE = (
    "eval",
    "mesh",
    "train/log_every",
    "train/eval_every",
    "train/save_every",
    "train/max_to_keep",
    "train/keep_best",
    "train/report_to",
)

# Settings that change rounding, memory or speed alone: a resumed run may change them too, which is
# logged, and what is finished counts with any of them.
ROUNDING = ("train/remat", "train/loss_chunk", "train/matmul_precision", "data/grad_accum_steps")


def settings(run: RunConfig) -> dict[str, Any]:
    """Every setting of `run`: name ("train/steps") -> value; adapter.init by its name where it was
    left to the method.
    """
    return flatten(to_dict(replace(run, adapter=run.adapter.explicit())))


def differences(there: RunConfig, run: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ: name -> (its value in `there`, in `run`)."""
    old, new = settings(there), settings(run)
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    }


def same_numbers(there: RunConfig, run: RunConfig) -> bool:
    """Whether two runs have the same numbers, held-out losses among them, up to the rounding of
    another mesh or of other settings in `ROUNDING`.

    Where the files of a known task lie does not matter; the directory of rows of one's own does,
    because it alone says which rows are read.
    """
    return not [key for key in differences(there, run) if not _is_no_number(key, there, run)]


def same_files(there: RunConfig, run: RunConfig, tasks: Iterable[str] | None = None) -> bool:
    """Whether two data.data_dir can only hold the same rows of `tasks` (None: those that `run`
    trains on): rows of known tasks, or one place.
    """
    names = parse_mixture(run.data.task)[0] if tasks is None else tasks
    return not has_own_rows(names) or _resolved(there) == _resolved(run)


def _is_no_number(key: str, there: RunConfig, run: RunConfig) -> bool:
    if key == "data/data_dir":
        return same_files(there, run)
    if key == "data/grad_accum_steps" and run.adapter.dropout:  # drawn for each micro-batch
        return False
    return key.startswith((*FREE, *ROUNDING)) and not key.startswith("eval/")


def rounded_as(there: RunConfig, run: RunConfig) -> RunConfig:
    """`run` with the settings in `ROUNDING` taken from `there`, as far as its mesh allows."""
    for key in ROUNDING:
        section, name = key.split("/")
        part = replace(getattr(run, section), **{name: getattr(getattr(there, section), name)})
        with contextlib.suppress(ConfigError):  # micro-batches that another mesh does not divide
            run = replace(run, **{section: part})
    return run


def _resolved(run: RunConfig) -> Path | None:
    return Path(run.data.data_dir).expanduser().resolve() if run.data.data_dir else None
