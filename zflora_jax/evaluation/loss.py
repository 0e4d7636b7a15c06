"""The held-out loss of a model, with or without adapters beside it."""

from __future__ import annotations

import math

import jax

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import DataConfig
from zflora_jax.core.trees import Tree
from zflora_jax.data.pipeline import eval_batches
from zflora_jax.data.tokenization import Encoded
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use
from zflora_jax.parallel.sharding import BATCH
from zflora_jax.training.trainer import NonFiniteError, eval_step


def held_out_loss(
    model: Model,
    encoded: Encoded,
    data: DataConfig,
    *,
    adapter: AdapterConfig | None = None,
    adapters: Tree | None = None,
    batch_size: int = 8,
    chunk: int = 256,
) -> dict[str, float]:
    """Mean cross-entropy per target token over all rows.

    Args:
      model: the base, or a fused model.
      encoded: the held-out rows.
      data: its bucket_lengths are what batches are padded to.
      adapter: the kind of `adapters`. None: the model alone.
      adapters: the tree beside the base.
      batch_size: rows at one time; the loss does not depend on it.
      chunk: positions whose logits exist at one time.

    Returns:
      {"loss": nats per target token, "tokens": target tokens, "rows": rows}.

    Raises:
      NonFiniteError: the loss is NaN or infinite.
    """
    variables = {"params": model.params} | ({} if adapters is None else {"adapters": adapters})
    batches = eval_batches(encoded, fill_rows(batch_size, model.params, BATCH), data.bucket_lengths)
    with mesh_in_use(model.params):
        sums = [eval_step(model.config, adapter, variables, batch, chunk) for batch in batches]
    losses, tokens = zip(*jax.device_get(sums), strict=True)
    loss = float(sum(losses) / sum(tokens))
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the held-out loss is {loss}: the model or its adapters are damaged, or the learning"
            " rate was too high."
        )
    return {"loss": loss, "tokens": float(sum(tokens)), "rows": float(len(encoded))}
