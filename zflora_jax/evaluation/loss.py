"""The held-out loss of a model, with or without adapters beside it."""

from __future__ import annotations

import math

import jax

from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.data.pipeline import eval_batches, one_sequence_a_row
from zflora_jax.data.tokenization import Encoded
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use
from zflora_jax.parallel.sharding import BATCH
from zflora_jax.training.trainer import eval_step


def held_out_loss(
    run: RunConfig, model: Model, encoded: Encoded, adapters: Tree | None = None
) -> dict[str, float]:
    """Mean cross-entropy per target token over all rows.

    Args:
      run: its settings. The loss depends only on `adapter`, and on that only with `adapters`; the
        rest says how much is computed at one time (micro-batch, bucket_lengths, loss_chunk).
      model: the base, or a fused model.
      encoded: the held-out rows.
      adapters: the tree beside the base. None: the model alone.

    Returns:
      {"loss": nats per target token, "tokens": target tokens, "rows": rows}.

    Raises:
      NonFiniteError: the loss is NaN or infinite.
    """
    variables = {"params": model.params} | ({} if adapters is None else {"adapters": adapters})
    adapter, chunk = None if adapters is None else run.adapter, run.train.loss_chunk
    rows = fill_rows(run.data.micro_batch_size, model.params, BATCH)
    batches = eval_batches(encoded, rows, run.data.bucket_lengths)
    with mesh_in_use(model.params):
        sums = [
            eval_step(model.config, adapter, variables, one_sequence_a_row(batch), chunk)
            for batch in batches
        ]
    losses, tokens = zip(*jax.device_get(sums), strict=True)
    loss = float(sum(losses) / sum(tokens))
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the held-out loss is {loss}: the model or its adapters are damaged, or the learning"
            " rate was too high."
        )
    return {"loss": loss, "tokens": float(sum(tokens)), "rows": float(len(encoded))}
