"""report.json: the outcome of a run. It is written when training ends, and stays as it is when the
finished run is run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from zflora_jax.adapters.counts import count_params
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import to_dict
from zflora_jax.core.storage import as_path
from zflora_jax.experiments.plan import step_attention
from zflora_jax.experiments.setup import Setup
from zflora_jax.parallel import distributed
from zflora_jax.reporting.files import write_json
from zflora_jax.training.workdir import REPORT_FILE, read_starts

Report = dict[str, Any]
_EVAL_ROWS = "eval_fingerprint"  # of the rows of the held-out loss


def read_report(workdir: str | Path) -> Report | None:
    """The report of the run in `workdir`, None if it is missing or damaged."""
    try:
        found = json.loads((as_path(workdir) / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("config"), dict) else None


def write_report(workdir: Path, report: Report) -> Report:
    """Write `report`, in the process that writes. Returns it."""
    if distributed.is_main():
        write_json(workdir / REPORT_FILE, report)
    return report


def new_report(
    setup: Setup,
    workdir: Path,
    first: int,
    loss: Mapping[str, float],
    env: Report,
    timings: Mapping[str, float | None],
) -> Report:
    """Write the report of a run that was trained to its end.

    Args:
      setup: base and data of the run.
      workdir: where report.json goes.
      first: the step that this start went on from.
      loss: the held-out loss after the last step, see `loss.held_out_loss`.
      env: of this process, see `provenance.environment`.
      timings: in seconds, and data_wait_share.
    """
    return write_report(
        workdir,
        {
            **_facts(setup),
            "steps": setup.run.train.steps,
            "resumed_from": first,
            **_loss_fields(setup, loss),
            **timings,
            "processes": jax.process_count(),
            "environment": env,
        },
    )


def finished_report(
    setup: Setup,
    workdir: Path,
    seconds: float,
    env: Report,
    evaluate: Callable[[], Mapping[str, float]],
) -> Report:
    """The report of a finished run that is run again. Every process of the run calls this.

    The report that is there keeps its commit, device, date and timings. Its held-out loss is
    computed again if eval.split, eval.limit or the rows themselves have changed. A report that is
    missing, damaged or of fewer steps is written again, with the environment that the last start of
    training recorded.

    Args:
      setup: base and data of the run.
      workdir: of the run.
      seconds: of training, as the last checkpoint has them.
      env: of this process, for a run that recorded no start.
      evaluate: gives the held-out loss, see `loss.held_out_loss`.
    """
    run, stored = setup.run, read_report(workdir)
    identity = {"steps": run.train.steps, **setup.fingerprints}
    if stored is None or any(stored.get(key) != value for key, value in identity.items()):
        trained = [
            start
            for start in read_starts(workdir)
            if start.get("step", run.train.steps) < run.train.steps
        ]
        start = trained[-1] if trained else env
        report = {
            **_facts(setup),
            "steps": run.train.steps,
            "resumed_from": run.train.steps,
            "processes": start.get("processes", 1),
            "seconds": seconds,
            "environment": {
                key: value
                for key, value in start.items()
                if key not in ("step", "changed", "processes")
            },
            **_loss_fields(setup, evaluate()),
        }
        return write_report(workdir, report)
    now, then = to_dict(run.eval), stored["config"]["eval"]
    same = all(now[key] == then.get(key) for key in ("split", "limit"))
    rows = setup.eval_set.fingerprint()
    same = same and stored.get(_EVAL_ROWS, rows) == rows  # an older report does not say
    if same and stored.get(f"{run.eval.split}_loss") is not None:
        return stored
    config = stored["config"] | {"eval": now}
    return write_report(workdir, stored | _loss_fields(setup, evaluate()) | {"config": config})


def _facts(setup: Setup) -> Report:
    """What the report says of settings, base, adapter and data."""
    run = setup.run
    return {
        "method": run.adapter.method,
        "params_base": count_base(setup.model.config),
        "params_trainable": count_params(setup.model.config, run.adapter),
        "train_rows": setup.examples,
        "train_rows_dropped": setup.train_set.dropped,
        "train_documents_cut": setup.train_set.truncated,
        "train_rows_packed": len(setup.train_set) if run.data.packing else None,
        "train_on_prompt": run.data.train_on_prompt,
        "attention": step_attention(run, setup.model.config, setup.mesh)[0],
        **setup.fingerprints,
        "config": to_dict(run),
    }


def _loss_fields(setup: Setup, loss: Mapping[str, float]) -> Report:
    """The held-out loss under the names that the report has for it, and which rows it is of."""
    split = setup.run.eval.split
    return {
        f"{split}_loss": loss["loss"],
        f"{split}_rows": int(loss["rows"]),
        _EVAL_ROWS: setup.eval_set.fingerprint(),
    }
