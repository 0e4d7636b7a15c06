"""Export what a run has trained, and say how far the export is from the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.methods import count_params
from zflora_jax.core.fields import nearest, require
from zflora_jax.core.model import fingerprint
from zflora_jax.core.run_config import RunConfig
from zflora_jax.evaluation.export_gap import export_gap
from zflora_jax.evaluation.gap_prompts import gap_prompts
from zflora_jax.experiments.restore import load_run
from zflora_jax.experiments.run_report import read_report
from zflora_jax.hf.peft import save_peft
from zflora_jax.hf.save import save_hf
from zflora_jax.reporting.files import local_path


def export_run(
    workdir: str | Path,
    out: str | Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    checkpoint: int | str | None = None,
    eps_z: float | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Export what a run has trained.

    Args:
      workdir: of the run.
      out: directory to write.
      format: "hf", a fused Hugging Face directory, or "peft", LoRA adapters.
      dtype: of the "hf" weights, as `save_hf` takes it.
      checkpoint: which one, as the step of `load_run`.
      eps_z: scale of the residual state in "hf", as `save_hf` takes it.
      mesh: as in `load_run`.

    Returns:
      A report of what was written. For "hf" it says how far the export's logits are from those of
      the fused model in float32: max and mean |dlogit|, and top-1 agreement, on the prompts of
      held-out rows, or on built-in texts if the data is gone ("gap_prompts" says which).

    Raises:
      ConfigError: there is no such checkpoint, or it cannot be exported like this.
    """
    local_path(out, "out")
    require(format in ("hf", "peft"), f"format={format!r}: {nearest(format, ('hf', 'peft'))}.")
    count = jax.process_count()
    require(
        count == 1,
        f"{count} processes cannot export a run together: start one, with the devices that the"
        " model needs.",
    )
    run, model, adapters, step = load_run(workdir, checkpoint, mesh=mesh)
    if format == "peft":
        return save_peft(out, model, run.adapter, adapters)
    fused = fuse(model, run.adapter, adapters)
    card = {
        "task": run.data.task,
        "steps": step,
        "trainable parameters": count_params(model.config, run.adapter),
        **_loss_line(run, workdir, step),
    }
    prompts, origin = gap_prompts(run, model)  # before anything is written
    report = save_hf(
        out, fused, dtype=dtype, base_fingerprint=fingerprint(model), card=card, eps_z=eps_z
    )
    return report | {"gap_prompts": origin} | export_gap(fused, out, prompts)


def _loss_line(run: RunConfig, workdir: str | Path, step: int) -> dict[str, float]:
    """The held-out loss for the model card, if the run's report has that of `step`."""
    report = read_report(workdir) or {}
    loss = report.get(f"{run.eval.split}_loss") if report.get("steps") == step else None
    return {} if loss is None else {f"{run.eval.split} loss": loss}
