"""report.json: the outcome of a run. It is written when training ends, and running the finished run
again leaves it unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zflora_jax.adapters.widths import count_params
from zflora_jax.core.architecture import count_base
from zflora_jax.core.fields import to_dict
from zflora_jax.core.storage import as_path
from zflora_jax.core.trees import Tree
from zflora_jax.experiments.setup import Setup
from zflora_jax.parallel import distributed
from zflora_jax.reporting.files import write_json
from zflora_jax.training.objective import objective_of
from zflora_jax.training.workdir import REPORT_FILE, read_starts

Report = dict[str, Any]
_EVAL_ROWS = "eval_fingerprint"  # of the rows of the held-out loss


def read_report(workdir: str | Path) -> Report | None:
    """The report of the run in `workdir`, None if it is missing or damaged."""
    try:
        found = json.loads((as_path(workdir) / REPORT_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("config"), dict) else None


def new_report(
    setup: Setup,
    workdir: Path,
    first: int,
    loss: Mapping[str, float],
    env: Report,
    more: Mapping[str, Any],
) -> Report:
    """Writes the report of a run that was trained to its end.

    Args:
      setup, workdir: The run, and its directory.
      first: The step from which the last start resumed.
      loss: The held-out loss after the last step, see `loss.held_out_loss`.
      env: The environment of the training, see `provenance.environment`.
      more: Further entries, such as seconds.
    """
    run, config = setup.run, setup.model.config
    report = {
        "method": run.adapter.method,
        "params_base": count_base(config),
        "params_trainable": count_params(config, run.adapter),
        "train_rows": setup.examples,
        "train_rows_dropped": setup.train_set.dropped,
        "train_documents_cut": setup.train_set.truncated,
        "train_rows_packed": len(setup.train_set) if run.data.packing else None,
        "attention": setup.attention[0],
        **setup.fingerprints,
        "config": to_dict(run),
        "steps": run.steps,
        "epochs": run.steps * run.data.batch_size / len(setup.train_set),
        "resumed_from": first,
        **_loss_fields(setup, loss),
        "environment": env,
        **more,
    }
    return _write(workdir, report)


def finished_report(
    setup: Setup, workdir: Path, seconds: float, env: Report, adapters: Tree
) -> Report:
    """Returns the report of a finished run that is run again. Every process calls this.

    An existing report keeps its commit, device, date and timings. Its held-out loss is computed
    again if the rows have changed, or eval.split or eval.limit. A report that is missing, damaged
    or has fewer steps is written again, with the environment that the last start of training
    recorded.

    Args:
      setup, workdir: The run, and its directory.
      seconds: Seconds of training, from the last checkpoint.
      env: The environment of this process, for a run that recorded no start.
      adapters: The trained adapters.
    """
    run, stored = setup.run, read_report(workdir) or {}
    identity = {"steps": run.steps, **setup.fingerprints}
    if any(stored.get(key) != value for key, value in identity.items()):
        starts = [start for start in read_starts(workdir) if start["step"] < run.steps]
        start = starts[-1] if starts else env
        env = {key: value for key, value in start.items() if key not in _OF_START}
        more = {"seconds": seconds} | {x: start.get(x, 1) for x in ("processes", "together")}
        loss = setup.held_out_loss(adapters)
        return new_report(setup, workdir, run.steps, loss, env, more)
    same_rows = stored.get(_EVAL_ROWS) == setup.eval_set.fingerprint()
    if same_rows and stored.get(f"{run.eval.split}_loss") is not None:
        return stored
    config = stored["config"] | {"eval": to_dict(run.eval)}
    loss = _loss_fields(setup, setup.held_out_loss(adapters))
    return _write(workdir, stored | loss | {"config": config})


# See `workdir.record_start`.
_OF_START = ("step", "changed", "processes", "plain_texts", "repeated", "together")


def _loss_fields(setup: Setup, loss: Mapping[str, float]) -> Report:
    """The held-out loss under its names in the report, the objective's other means, and the
    fingerprint of their rows.
    """
    split, names = setup.run.eval.split, ("loss", *objective_of(setup.run).metrics)
    rows = {f"{split}_rows": int(loss["rows"]), _EVAL_ROWS: setup.eval_set.fingerprint()}
    return {f"{split}_{name}": loss[name] for name in names} | rows


def _write(workdir: Path, report: Report) -> Report:
    if distributed.is_main():
        write_json(workdir / REPORT_FILE, report)
    return report
