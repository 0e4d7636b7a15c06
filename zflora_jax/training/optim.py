"""A table of optimizers: gradients clipped by their global norm, a direction, weight decay, and a
learning rate with warm-up and decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from zflora_jax.core import trees
from zflora_jax.core.fields import require_in
from zflora_jax.core.run_config import OptimConfig

OPTIMIZERS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    "adamw": lambda optim: optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    # Its authors use a learning rate 3 to 10 times lower than AdamW's, and b2 = 0.99.
    "lion": lambda optim: optax.scale_by_lion(optim.b1, optim.b2),
    # Steps are not scaled by the size of the parameters: blocks that start at zero would not move.
    "adafactor": lambda optim: optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
    ),
    "sgd": lambda optim: optax.trace(optim.b1),
}
"""optim.optimizer -> transform of gradients to a direction; `make_optimizer` adds the rest."""

KEPT = ("/scale", "/bias")  # leaves that do not decay


def require_optimizer(name: str) -> None:
    """Raises ConfigError for an optimizer without a row in `OPTIMIZERS`."""
    require_in(OPTIMIZERS, name, f"optim.optimizer={name!r}")


def learning_rate_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of step 0, 1, ... of `steps`.

    It rises linearly from peak / warmup_steps to the peak, and decays over the remaining steps.
    """
    peak, warmup = optim.learning_rate, optim.warmup_steps
    last, remaining = peak * optim.final_lr_fraction, max(1, steps - warmup)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, remaining, alpha=optim.final_lr_fraction),
        "linear": optax.linear_schedule(peak, last, remaining),
        "constant": optax.constant_schedule(peak),
    }[optim.schedule]
    if not warmup:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(optim: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer that `optim` describes, for a run of `steps` steps: gradients clipped by their
    global norm, a direction of `OPTIMIZERS`, weight decay (norm gains and biases have none), and
    the learning rate. With LoRA+ the blocks that write to the base's channels are scaled once more.
    """

    def named(wanted: Callable[[str], bool]) -> Callable[[Any], Any]:
        return lambda params: trees.map_with_names(lambda name, _: wanted(name), params)

    require_optimizer(optim.optimizer)
    decayed = named(lambda name: not name.endswith(KEPT))
    # A nested chain, like optax.adamw: checkpoints have the state in this form.
    parts = [
        optax.chain(
            OPTIMIZERS[optim.optimizer](optim),
            optax.add_decayed_weights(optim.weight_decay, decayed),
            optax.scale_by_learning_rate(learning_rate_schedule(optim, steps)),
        )
    ]
    if optim.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(optim.clip_norm))
    if optim.loraplus_ratio != 1:
        writes_base = named(lambda name: name.endswith(("/lora_b", "/backward")))
        parts.append(optax.masked(optax.scale(optim.loraplus_ratio), writes_base))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]
