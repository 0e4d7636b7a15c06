"""export_gap: how far the numbers of an export are from those of the model in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.hf.directory import local_copy
from zflora_jax.hf.restore import load_stock
from zflora_jax.inference.batching import padded_length
from zflora_jax.nn.llama import forward
from zflora_jax.parallel.mesh import mesh_of


def export_gap(
    model: Model,
    path: str | os.PathLike[str],
    prompts: Sequence[str] | Sequence[Sequence[int]] | np.ndarray,
) -> dict[str, float]:
    """Logits of `model` in float32 against those of the export at `path`: the stored stock-form
    tensors, run in the dtype they are stored in (float16 exports: the rounded tensors, in float32).

    Args:
      model: what was exported (not packed).
      prompts: texts for the model's tokenizer, or int tokens [B, T].

    Returns:
      {"max_abs_dlogit", "mean_abs_dlogit", "logit_scale": largest |logit|, "top1_agreement": share
      of positions whose likeliest token agrees}.

    Raises:
      CheckpointError: NaN or infinite logits on either side.
    """
    export = load_stock(local_copy(path), model.config.execution.scan_layers, mesh_of(model.params))
    exact = Model(model.config.replace(dtype="float32"), model.params)
    worst, total, scale, same, logits, positions = 0.0, 0.0, 0.0, 0, 0, 0
    for row in prompts:
        ids = model.tokenizer(row)["input_ids"] if isinstance(row, str) else row
        require(len(ids) > 0, "export_gap needs prompts of at least one token.")
        length = padded_length(len(ids))  # few lengths, few compilations
        tokens = (
            jnp.zeros((1, length), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids, jnp.int32))
        )
        real = jnp.arange(length)[None] < len(ids)
        a, b = (
            np.asarray(forward(m, tokens, padding_mask=real))[:, : len(ids)]
            for m in (exact, export)
        )
        damaged = "the model itself is damaged, or trained with too high a learning rate"
        _require_finite(a, "model in memory", damaged)
        _require_finite(b, f"export at {path}", "export in float32 or bfloat16")
        gap = np.abs(a - b)
        worst = max(worst, float(gap.max()))
        total += float(gap.sum(dtype=np.float64))
        scale = max(scale, float(np.abs(a).max()))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        logits += gap.size
        positions += len(ids)
    require(positions > 0, "export_gap needs at least one prompt.")
    return {
        "max_abs_dlogit": worst,
        "mean_abs_dlogit": total / logits,
        "logit_scale": scale,
        "top1_agreement": same / positions,
    }


def _require_finite(logits: np.ndarray, what: str, advice: str) -> None:
    if not np.isfinite(logits).all():
        raise CheckpointError(
            f"logits of the {what} are NaN or infinite, so the export is not to be used: {advice}."
        )
