"""The optimizer: AdamW under a global-norm clip, with warm-up and decay."""

from __future__ import annotations

from typing import Any

import optax

from zflora_jax.core import trees
from zflora_jax.core.run_config import OptimConfig


def learning_rate_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: linear warm-up from peak / warmup_steps to the peak, then
    the decay over the remaining steps.
    """
    peak, last, warmup = (
        optim.learning_rate,
        optim.learning_rate * optim.final_lr_fraction,
        optim.warmup_steps,
    )
    remaining = max(1, steps - warmup)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, remaining, alpha=optim.final_lr_fraction),
        "linear": optax.linear_schedule(peak, last, remaining),
        "constant": optax.constant_schedule(peak),
    }[optim.schedule]
    return (
        optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup), decay], [warmup])
        if warmup
        else decay
    )


def make_optimizer(optim: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW. Weight decay skips norm gains. State exists for the
    trainable tree alone: it never sees the frozen base.
    """

    def decayed(params: Any) -> Any:
        return trees.map_with_names(lambda name, _: not name.endswith("/scale"), params)

    def writes_base(params: Any) -> Any:
        return trees.map_with_names(lambda name, _: name.endswith(("/lora_b", "/backward")), params)

    schedule = learning_rate_schedule(optim, steps)
    parts = [
        optax.adamw(
            schedule,
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mask=decayed,
        )
    ]
    if optim.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(optim.clip_norm))
    if optim.loraplus_ratio != 1:
        parts.append(optax.masked(optax.scale(optim.loraplus_ratio), writes_base))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]
