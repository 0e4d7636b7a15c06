"""The whole path once: train, evaluate before and after, fuse, check that fused equals adapted,
decode side by side, export, report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.bench.latency import decode_latency
from zflora_jax.core.fields import ConfigError, require, to_dict
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.textfile import lines_of
from zflora_jax.data.pipeline import eval_batches
from zflora_jax.evaluation.task import evaluate
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.export import export_run
from zflora_jax.experiments.restore import fuse_trained
from zflora_jax.experiments.setup import held_out
from zflora_jax.experiments.train import Trained, train
from zflora_jax.nn.llama import forward
from zflora_jax.parallel.mesh import mesh_if_there
from zflora_jax.reporting.files import atomic_write, local_path, write_json
from zflora_jax.reporting.metrics import METRICS_FILE
from zflora_jax.reporting.plots import training_curves
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table
from zflora_jax.training.workdir import adopt

SAMPLES = 3
# Of the logit scale (CONTRIBUTING.md, "Tolerances"); bfloat16 promises nothing.
FUSED_TOLERANCE = {
    "float32": 1e-5,
    "bfloat16": float("inf"),
}


def quickstart(run: RunConfig, workdir: str | Path, *, console: bool = True) -> dict[str, Any]:
    """Run the whole path once.

    Args:
      run: the settings.
      workdir: directory of the run; a run that is already there is resumed.
      console: whether progress and samples are printed.

    Returns:
      The contents of <workdir>/quickstart.json (its keys are in `report` below).

    Raises:
      ConfigError: no accuracy or loss to report, or fused logits that are not the adapted ones.
    """
    workdir, env, parts = local_path(workdir, "workdir"), environment(), dict[str, float]()
    timed, started = _timer(parts, console), time.perf_counter()
    run, _ = adopt(workdir, run)
    base = load_base(run, mesh_if_there(run.mesh))
    timed("load the model")
    before = evaluate(run, base, out=workdir / "eval" / "before", console=console)
    _require_figures(run, before)
    timed("evaluate the base")
    trained = train(run, workdir, model=base, console=console)
    timed("train")
    fused = fuse_trained(trained.model, run.adapter, trained.adapters, donate=False)
    gap = _fused_gap(run, trained, fused)
    timed("fuse and compare with adapted")
    after = evaluate(run, fused, out=workdir / "eval" / "after", console=console)
    timed("evaluate the fused model")
    latency = decode_latency({"base": trained.model, "fused": fused})
    timed("decode base and fused side by side")
    exported = export_run(workdir, workdir / "export")
    timed("export")
    label = f"{run.adapter.method} on {run.data.task}"
    training_curves({label: workdir / METRICS_FILE}, workdir / "curves", label)

    report = {
        "method": run.adapter.method,
        "params_base": trained.report["params_base"],
        "params_trainable": trained.report["params_trainable"],
        **_figures(before, after, gap, latency),
        "export_dir": str(workdir / "export"),
        "export_max_abs_dlogit": exported["max_abs_dlogit"],
        "export_top1_agreement": exported["top1_agreement"],
        "seconds": time.perf_counter() - started,
        "seconds_by_part": parts,
        "latency": latency,
        "samples": _samples(workdir),
        "config": to_dict(run),
        "environment": env,
    }
    write_json(workdir / "quickstart.json", report)
    atomic_write(workdir / "report.md", _page(report).encode())
    if console:
        print(_samples_text(report))
    _require_equal(gap, run.train.dtype, workdir)
    return report


def _timer(parts: dict[str, float], console: bool) -> Callable[[str], None]:
    """What notes in `parts` the seconds since it was called before, under a name, and says them."""
    started = time.perf_counter()

    def timed(name: str) -> None:
        parts[name] = time.perf_counter() - started - sum(parts.values())
        if console:
            print(f"  {name}: {parts[name]:.0f} s", flush=True)

    return timed


def _require_figures(run: RunConfig, found: Mapping[str, Any]) -> None:
    require(
        {"accuracy", "loss"} <= found.keys(),
        "quickstart reports accuracy and loss, and with these settings an evaluation of task"
        f" {run.data.task!r} gives no {' and no '.join({'accuracy', 'loss'} - found.keys())}. Set"
        " eval.generate and eval.loss, and choose a task with answers; or use train, eval and"
        " export.",
    )


def _figures(before: Any, after: Any, gap: Any, latency: Any) -> dict[str, Any]:
    """Accuracy, loss, agreement of fused and adapted, and time per token."""
    return {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "accuracy_rows": after["rows"],
        "loss_before": before["loss"],
        "loss_after": after["loss"],
        "fused_max_abs_dlogit": gap["max_abs_dlogit"],
        "logit_scale": gap["logit_scale"],
        "tpot_ms_base": latency["base"]["tpot_ms"],
        "tpot_ms_fused": latency["fused"]["tpot_ms"],
        "tpot_ratio": latency["fused"]["tpot_ms"] / latency["base"]["tpot_ms"],
    }


def _require_equal(gap: dict[str, float], dtype: str, workdir: Path) -> None:
    allowed = FUSED_TOLERANCE[dtype]
    if not gap["max_abs_dlogit"] <= allowed * gap["logit_scale"]:  # NaN is not within it either
        gap_text = f"{gap['max_abs_dlogit']:.3g} at a logit scale of {gap['logit_scale']:.3g}"
        raise ConfigError(
            f"fused and adapted logits differ by {gap_text}, more than {allowed:g} x scale; the"
            f" report is in {workdir}."
        )


def _fused_gap(run: RunConfig, trained: Trained, fused: Any) -> dict[str, float]:
    """Largest |dlogit| between the fused and the adapted model on held-out rows, and the largest
    |logit|.
    """
    encoded = held_out(run, trained.model)
    batch = next(iter(eval_batches(encoded, min(8, len(encoded)), run.data.bucket_lengths)))
    adapted = np.asarray(
        forward(
            trained.model,
            batch["tokens"],
            run.adapter,
            trained.adapters,
            segment_ids=batch["segments"],
        )
    )
    other = np.asarray(forward(fused, batch["tokens"], segment_ids=batch["segments"]))
    real = batch["segments"][..., None] > 0
    return {
        "max_abs_dlogit": float(np.max(np.abs(adapted - other), where=real, initial=0)),
        "logit_scale": float(np.max(np.abs(adapted), where=real, initial=0)),
    }


def _samples(workdir: Path) -> list[dict[str, str]]:
    """The first questions of the test split, with the answers before and after training."""
    before, after = (
        lines_of((workdir / "eval" / f"{name}.jsonl").read_text(encoding="utf-8"))[:SAMPLES]
        for name in ("before", "after")
    )
    return [
        {
            "prompt": base["prompt"],
            "answer": base["answer"],
            "base": base["output"],
            "tuned": tuned["output"],
        }
        for base, tuned in zip(map(json.loads, before), map(json.loads, after), strict=True)
    ]


def _samples_text(report: dict[str, Any]) -> str:
    return "\n".join(
        f"\nQ: {s['prompt']}\n   base:  {' '.join(s['base'].split())}\n   tuned:"
        f" {' '.join(s['tuned'].split())}\n   (answer: {s['answer']})"
        for s in report["samples"]
    )


def _page(report: dict[str, Any]) -> str:
    origin = origin_line(report["environment"])
    rows = [
        {
            "": "accuracy",
            "base": f"{report['accuracy_before']:.3f}",
            "tuned and fused": f"{report['accuracy_after']:.3f}",
        },
        {
            "": "held-out loss",
            "base": f"{report['loss_before']:.4f}",
            "tuned and fused": f"{report['loss_after']:.4f}",
        },
        {
            "": "TPOT (ms)",
            "base": f"{report['tpot_ms_base']:.1f}",
            "tuned and fused": f"{report['tpot_ms_fused']:.1f}",
        },
    ]
    facts = (
        f"{report['method']}, {report['params_trainable']:,} trainable parameters beside"
        f" {report['params_base']:,}; {report['accuracy_rows']} held-out problems. Fused against"
        f" adapted: max |dlogit| {report['fused_max_abs_dlogit']:.2e} at a logit scale of"
        f" {report['logit_scale']:.1f}. Exported directory against the fused model: max |dlogit|"
        f" {report['export_max_abs_dlogit']:.2e}, top-1 agreement"
        f" {report['export_top1_agreement']:.4f}."
    )
    return "\n".join(
        [
            "# Quickstart",
            "",
            markdown_table(rows, ["", "base", "tuned and fused"]),
            "",
            facts,
            "",
            f"{origin} Seed {report['config']['train']['seed']}, {report['seconds']:.0f} s.",
            "",
        ]
        + ["![curves](curves.png)", "", "```", _samples_text(report).strip(), "```", ""]
    )
