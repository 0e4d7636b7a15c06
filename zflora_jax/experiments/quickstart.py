"""The whole path once: train, evaluate before and after, fuse, check that fused equals adapted,
compare decode speed, export, switch the adapter, unfuse the base, report.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.adapters.fuse import swap, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.fields import require, to_dict
from zflora_jax.core.model import Model, fingerprint
from zflora_jax.core.quantize_config import quantize_config
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.textfile import lines_of
from zflora_jax.data.pipeline import eval_batches
from zflora_jax.evaluation.task import evaluate
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.export import export_run
from zflora_jax.experiments.latency import decode_latency
from zflora_jax.experiments.restore import fuse_trained
from zflora_jax.experiments.setup import held_out
from zflora_jax.experiments.train import Trained, train
from zflora_jax.hf.gguf.read import has_blocks
from zflora_jax.hf.hub import locate
from zflora_jax.nn.llama import forward
from zflora_jax.parallel.mesh import mesh_if_there
from zflora_jax.reporting.files import local_path, write_json
from zflora_jax.reporting.metrics import METRICS_FILE
from zflora_jax.reporting.plots import loss_curves
from zflora_jax.reporting.provenance import environment
from zflora_jax.training.workdir import adopt

# Largest |dlogit| allowed between fused and adapted logits, relative to the logit scale
# (CONTRIBUTING.md, "Tolerances"). There is no bound for bfloat16.
FUSED_TOLERANCE = {"float32": 1e-5, "bfloat16": float("inf")}
SWITCHES = 10  # of the adapter of a live model


def quickstart(run: RunConfig, workdir: str | Path, *, console: bool = True) -> dict[str, Any]:
    """Trains, evaluates, fuses, checks, decodes and exports once.

    Args:
      run: The run's settings.
      workdir: Directory of the run; a run that is already there is resumed.
      console: Whether progress and samples are printed.

    Returns:
      The contents of <workdir>/quickstart.json: `report` below.

    Raises:
      ConfigError: The settings give no accuracy or no loss, or the fused logits differ from the
        adapted ones.
    """
    workdir, env, started = local_path(workdir, "workdir"), environment(), time.perf_counter()
    run, _ = adopt(workdir, run)
    base = load_base(run, mesh_if_there(run.mesh))
    before = evaluate(run, base, out=workdir / "eval" / "before", console=console)
    _require_figures(run, before)
    trained = train(run, workdir, model=base, console=console)
    run = trained.run
    fused = fuse_trained(trained.model, run.adapter, trained.adapters, donate=False)
    gap, scale = _fused_gap(run, trained, fused)
    # The loss is the one at the end of training: by `gap` the fused model has the same logits.
    answers = replace(run, eval=replace(run.eval, loss=False))
    after = evaluate(answers, fused, out=workdir / "eval" / "after", console=console)
    latency = decode_latency({"base": trained.model, "fused": fused})
    exported = export_run(workdir, workdir / "export")
    label = f"{run.adapter.method} on {run.data.task}"
    loss_curves({label: workdir / METRICS_FILE}, workdir / "curves", label, before["loss"])
    report = {
        "method": run.adapter.method,
        **{name: trained.report[name] for name in ("params_base", "params_trainable")},
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "accuracy_rows": after["rows"],
        "loss_before": before["loss"],
        "loss_after": trained.report[f"{run.eval.split}_loss"],
        "tpot_ms_base": latency["base"]["tpot_ms"],
        "tpot_ms_fused": latency["fused"]["tpot_ms"],
        "tpot_ratio": latency["fused"]["tpot_ratio"],  # within turns
        "fused_max_abs_dlogit": gap,
        "logit_scale": scale,
        "export_dir": str(workdir / "export"),
        "export_max_abs_dlogit": exported["max_abs_dlogit"],
        "export_top1_agreement": exported["top1_agreement"],
        **_switched(trained, fused),
        **_on_blocks(answers, trained, workdir / "eval" / "blocks", console),
        "seconds": time.perf_counter() - started,
        "latency": latency,
        "samples": _samples(workdir),
        "config": to_dict(run),
        "environment": env,
    }
    write_json(workdir / "quickstart.json", report)
    for sample in report["samples"] if console else ():
        print("", *(f"{name}: {' '.join(x.split())}" for name, x in sample.items()), sep="\n")
    _require_equal(gap, scale, run.train.dtype, workdir)
    return report


def _require_figures(run: RunConfig, found: Mapping[str, Any]) -> None:
    missing = sorted({"accuracy", "loss"} - found.keys())
    require(
        not missing,
        "quickstart reports accuracy and loss, and with these settings an evaluation of task"
        f" {run.data.task!r} gives no {' and no '.join(missing)}. Set eval.generate and eval.loss,"
        " and choose a task with answers and train.loss=cross_entropy; or use train, eval and"
        " export.",
    )


def _require_equal(gap: float, scale: float, dtype: str, workdir: Path) -> None:
    """Raises ConfigError if fused and adapted logits differ by more than the tolerance, or NaN."""
    allowed = FUSED_TOLERANCE[dtype]
    require(
        gap <= allowed * scale,
        f"fused and adapted logits differ by {gap:.3g} at a logit scale of {scale:.3g}, more than"
        f" {allowed:g} x scale; the report is in {workdir}.",
    )


def _fused_gap(run: RunConfig, trained: Trained, fused: Model) -> tuple[float, float]:
    """Returns (largest |dlogit| of fused and adapted model, largest |logit|) on held-out rows."""
    encoded = held_out(run, trained.model)
    batch = next(iter(eval_batches(encoded, min(8, len(encoded)), run.data.bucket_lengths)))
    tokens, segments = batch["tokens"], batch["segments"]
    adapted = np.asarray(
        forward(trained.model, tokens, run.adapter, trained.adapters, segment_ids=segments)
    )
    other, real = np.asarray(forward(fused, tokens, segment_ids=segments)), segments[..., None] > 0
    return (
        float(np.max(np.abs(adapted - other), where=real, initial=0)),
        float(np.max(np.abs(adapted), where=real, initial=0)),
    )


def _switched(trained: Trained, fused: Model) -> dict[str, Any]:
    """Returns switch_ms, the median time to put another adapter into a live model, without compile
    time, and base_bit_for_bit, whether unfusing then gives the base bit for bit.

    `fused` cannot be used afterwards. A method that merges by addition has neither.
    """
    adapter = trained.run.adapter
    if not METHODS[adapter.method].widens:
        return {}
    others = [init_adapters(jax.random.key(0), trained.model, adapter), trained.adapters]
    seconds = []
    for number in range(SWITCHES):
        start = time.perf_counter()
        fused = swap(fused, others[number % 2])
        jax.block_until_ready(fused.params)
        seconds.append(time.perf_counter() - start)
    same = fingerprint(unfuse(fused)[0]) == fingerprint(trained.model)
    return {"switch_ms": 1e3 * statistics.median(seconds[1:]), "base_bit_for_bit": same}


def _on_blocks(run: RunConfig, trained: Trained, out: Path, console: bool) -> dict[str, Any]:
    """Returns accuracy_on_blocks, the accuracy of the adapter fused with the quantised blocks of
    the base's .gguf file; nothing for another base or a method that merges by addition.
    """
    file = locate(run.model)
    blocks = file.suffix == ".gguf" and has_blocks(file) and not run.quantize.active
    if not blocks or not METHODS[run.adapter.method].widens:
        return {}
    kept = replace(run, quantize=quantize_config("keep"))
    base = load_base(kept, mesh_if_there(run.mesh))
    fused = fuse_trained(base, run.adapter, trained.adapters)
    return {"accuracy_on_blocks": evaluate(kept, fused, out=out, console=console)["accuracy"]}


def _samples(workdir: Path) -> list[dict[str, str]]:
    """Returns three questions of the test split, with the answers before and after training."""
    before, after = (
        [json.loads(line) for line in lines_of(path.read_text("utf-8"))[:3]]
        for path in (workdir / "eval" / "before.jsonl", workdir / "eval" / "after.jsonl")
    )
    return [
        {"prompt": x["prompt"], "base": x["output"], "tuned": y["output"], "answer": x["answer"]}
        for x, y in zip(before, after, strict=True)
    ]
