"""report.json: what a run has come to. Written when training ends, and kept as it is when the
finished run is run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zflora_jax.core.fields import to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.parallel import distributed
from zflora_jax.reporting.files import write_json
from zflora_jax.training.starts import read_starts

REPORT_FILE = "report.json"
Report = dict[str, Any]


def loss_fields(run: RunConfig, final: Mapping[str, float]) -> Report:
    """The held-out loss of `loss.held_out_loss` under the names that the report has for it."""
    return {f"{run.eval.split}_loss": final["loss"], f"{run.eval.split}_rows": int(final["rows"])}


def finished_report(
    run: RunConfig,
    workdir: Path,
    facts: Report,
    seconds: float,
    env: Report,
    evaluate: Callable[[], Mapping[str, float]],
) -> Report:
    """The report of a finished run that is run again; every process of a run of several calls this.

    The one that is there keeps commit, device, date and timings. The loss alone is made anew, where
    eval.split or eval.limit have changed. A report that is missing, damaged or of fewer steps is
    written again, with the environment that the last start of training recorded.

    Args:
      facts: what the report says of base, adapter and data. seconds: of training, as the last
        checkpoint has them.
      env: of this process, where no start was recorded. evaluate: the held-out loss, see
        `loss_fields`.
    """
    path = workdir / REPORT_FILE
    stored = _read(path)
    if stored is None or any(
        stored.get(key) != value
        for key, value in {"steps": run.train.steps, **_identity(facts)}.items()
    ):
        trained = [
            start
            for start in read_starts(workdir)
            if start.get("step", run.train.steps) < run.train.steps
        ]
        start = trained[-1] if trained else env
        origin = {
            "steps": run.train.steps,
            "resumed_from": run.train.steps,
            "processes": start.get("processes", 1),
        }
        environment = {
            key: value
            for key, value in start.items()
            if key not in ("step", "changed", "processes")
        }
        report = (
            facts
            | origin
            | {"seconds": seconds, "environment": environment}
            | loss_fields(run, evaluate())
        )
    else:
        now, then = to_dict(run.eval), stored["config"]["eval"]
        same = all(now[key] == then.get(key) for key in ("split", "limit"))
        if same and stored.get(f"{run.eval.split}_loss") is not None:
            return stored
        report = (
            stored | loss_fields(run, evaluate()) | {"config": stored["config"] | {"eval": now}}
        )
    if distributed.is_main():
        write_json(path, report)
    return report


def _identity(facts: Report) -> Report:
    return {key: facts[key] for key in ("base_fingerprint", "data_fingerprint")}


def _read(path: Path) -> Report | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("config"), dict) else None
