"""The distance between the logits of an export and those of the model in memory."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence

import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import gathered
from zflora_jax.data.encoding import encode_prompts, fit_documents
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.prompts import encode_prompt_texts
from zflora_jax.hf.directory import local_copy
from zflora_jax.hf.load import load_model
from zflora_jax.hf.restore import load_stock
from zflora_jax.inference.batching import padded_length
from zflora_jax.nn.llama import forward
from zflora_jax.parallel.mesh import mesh_of

log = logging.getLogger(__name__)

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "A baker has 24 boxes with 13 cakes each and sells 57 of them. How many are left?",
    "def add(a, b):\n    return a + b\n",
)
ROWS = 8


def export_gap(
    model: Model,
    path: str | os.PathLike[str],
    prompts: Sequence[str] | Sequence[Sequence[int]] | np.ndarray,
    *,
    donate: bool = False,
) -> dict[str, float]:
    """Compares the logits of `model` in float32 with those of its export at `path`.

    The export's tensors are run in stock form, in their stored dtype (float16 exports and GGUF
    files in float32). Processes that share the model call this together, and all must be able to
    read the export.

    Args:
      model: The exported model, not packed.
      path: The export.
      prompts: Texts for the model's tokenizer, or int tokens [B, T].
      donate: Whether to empty `model.params` before the export is loaded; the model cannot be used
        afterwards.

    Returns:
      {"max_abs_dlogit", "mean_abs_dlogit", "logit_scale": largest |logit|, "top1_agreement": share
      of positions whose likeliest token agrees}.

    Raises:
      CheckpointError: Logits of either are NaN or infinite.
    """
    rows = [model.tokenizer(row)["input_ids"] if isinstance(row, str) else row for row in prompts]
    some = len(rows) > 0 and all(len(row) > 0 for row in rows)
    require(some, "export_gap needs prompts of at least one token.")
    mesh, stacked = mesh_of(model.params), model.config.execution.scan_layers
    exact = Model(model.config.replace(dtype="float32"), model.params)
    damaged = "the model itself is damaged, or trained with too high a learning rate"
    with tempfile.TemporaryFile() as file:  # as large as the vocabulary, for every token
        for ids in rows:
            logits = _logits(exact, ids)
            _require_finite(logits, "model in memory", damaged)
            np.save(file, logits)
        if donate:
            model.params.clear()
        file.seek(0)
        there, gaps = local_copy(path), []
        if there.suffix == ".gguf":
            export = load_model(there, scan_layers=stacked, mesh=mesh)
        else:
            export = load_stock(there, stacked, mesh)
        for ids in rows:
            found, wanted = _logits(export, ids), np.load(file)
            _require_finite(found, f"export at {path}", "export in float32 or bfloat16")
            gap, same = np.abs(found - wanted), found.argmax(-1) == wanted.argmax(-1)
            total = gap.sum(dtype=np.float64)
            gaps.append((gap.max(), total, np.abs(wanted).max(), same.sum(), gap.size, len(gap)))
    worst, total, scale, agree, sizes, positions = zip(*gaps, strict=True)
    return {
        "max_abs_dlogit": float(max(worst)),
        "mean_abs_dlogit": float(sum(total) / sum(sizes)),
        "logit_scale": float(max(scale)),
        "top1_agreement": float(sum(agree) / sum(positions)),
    }


def gap_prompts(run: RunConfig, model: Model) -> tuple[list[list[int]], str]:
    """Returns (token ids of prompts for comparing an export of `run`, their origin): the first
    held-out rows, or `TEXTS` if the run's data can no longer be read or has no prompts. No prompt
    is longer than the model's context, or than the longest allowed row of the run.
    """
    data = run.data
    try:
        whole = load_mixture(data, run.eval.split, ROWS)
        longest = min(data.bucket_lengths[-1], model.config.max_position_embeddings)
        rows = fit_documents(whole, model.tokenizer, data.prompt_style, longest, data.date)
        prompts = encode_prompts(rows, model.tokenizer, data.prompt_style, data.date)
        return [ids[:longest] for ids in prompts], f"{len(rows)} held-out rows"
    except (ConfigError, OSError) as error:
        log.warning(
            "the export is compared on built-in texts, because the run's held-out rows give no"
            " prompts: %s",
            error,
        )
        return encode_prompt_texts(model.tokenizer, TEXTS), f"{len(TEXTS)} built-in texts"


def _logits(model: Model, ids: Sequence[int]) -> np.ndarray:
    """Returns the logits [T, V] of a prompt of T tokens."""
    length = padded_length(len(ids))  # few lengths, few compilations
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(ids)] = ids
    found = forward(model, tokens, padding_mask=np.arange(length)[None] < len(ids))
    return gathered(found)[0, : len(ids)]


def _require_finite(logits: np.ndarray, what: str, advice: str) -> None:
    if not np.isfinite(logits).all():
        raise CheckpointError(
            f"logits of the {what} are NaN or infinite, so do not use the export: {advice}."
        )
