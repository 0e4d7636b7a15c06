"""The held-out loss of a model, with or without unmerged adapters."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax

from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree
from zflora_jax.data.encoding import Encoded
from zflora_jax.data.pipeline import eval_batches
from zflora_jax.parallel.mesh import fill_rows, mesh_in_use
from zflora_jax.parallel.sharding import BATCH
from zflora_jax.reporting.progress import announced
from zflora_jax.training.objective import Sums, objective_of
from zflora_jax.training.trainer import eval_step


def held_out_loss(
    run: RunConfig,
    model: Model,
    encoded: Encoded,
    adapters: Tree | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Returns the mean loss of the run's objective over all rows.

    Args:
      run: The run's settings. The loss depends on the objective and on `adapter`; other settings
        change only the size of computations (micro-batch, bucket_lengths, loss_chunk).
      model: The base, or a fused model.
      encoded: The held-out rows.
      adapters: The unmerged adapter tree; None for the model without adapters.
      on_batch: Called with the number of rows of each finished batch; compiling is then announced.

    Returns:
      {"loss": mean loss, e.g. nats per target token, `objective.unit`: the divisor, e.g. "tokens",
      "rows": rows, and the means of `objective.metrics`}.

    Raises:
      NonFiniteError: The loss is NaN or infinite.
    """
    objective = objective_of(run)
    variables = {"params": model.params} | ({} if adapters is None else {"adapters": adapters})
    adapter = None if adapters is None else run.adapter
    rows = fill_rows(run.data.micro_batch_size, model.params, BATCH)
    batches = eval_batches(encoded, rows, run.data.bucket_lengths)
    sums: list[Sums] = []
    with mesh_in_use(model.params):
        for start, batch in zip(range(0, len(encoded), rows), batches, strict=True):
            part, length = objective.take(batch), batch["tokens"].shape[1]
            text = f"compiling the held-out loss for {rows} x {length} tokens"
            with announced(text, on_batch is not None):
                sums.append(eval_step(model.config, adapter, variables, part, objective))
            if on_batch is not None:
                jax.block_until_ready(sums[-2:-1])  # the batch before: this one is under way
                on_batch(min(rows, len(encoded) - start))
    total = jax.tree.map(lambda *parts: sum(parts), *jax.device_get(sums))
    loss = float(total.loss / total.divisor)
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the held-out loss is {loss}: the model or its adapters are damaged, or the learning"
            " rate was too high."
        )
    means = {name: float(value / total.divisor) for name, value in total.metrics.items()}
    return {
        "loss": loss,
        objective.unit: float(total.divisor),
        "rows": float(len(encoded)),
        **means,
    }
