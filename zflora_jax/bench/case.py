"""The set-up of a training benchmark, and the memory of a process. Imports no jax, because a
process without it uses this module.
"""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zflora_jax.core.fields import nearest, require
from zflora_jax.core.quantize_config import STORED, Stored
from zflora_jax.core.run_config import OptimConfig

OPTIM = OptimConfig(schedule="constant", warmup_steps=0, learning_rate=1e-3)


@dataclass(frozen=True)
class Case:
    """One training set-up.

    Attributes:
      model: a source for `load_model`; of presets only smollm2-135m is loaded, the others get
        random weights.
      dtype: of the base.
      rank: of the adapter.
      batch: sequences per step.
      length: tokens per sequence.
      masked: share of positions, from the start, without loss.
      quantize: how the base's kernels are stored, as `quantize.kernels` of a run.
    """

    model: str
    dtype: str = "float32"
    rank: int = 16
    batch: int = 8
    length: int = 128
    masked: float = 0.0
    quantize: Stored = "none"

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "length"):
            least = 2 if name == "length" else 1  # no token stands before the first
            require(
                getattr(self, name) >= least,
                f"{name}={getattr(self, name)}: must be at least {least}.",
            )
        require(
            0 <= self.masked < 1,
            f"masked={self.masked}: a share of the positions, at least 0 and below 1.",
        )
        kinds = [kind for kind in STORED if kind != "keep"]  # random models have no file
        require(
            self.quantize in kinds, f"quantize={self.quantize}: {nearest(self.quantize, kinds)}."
        )

    def batch_arrays(self, vocab_size: int) -> dict[str, np.ndarray]:
        """A batch of random tokens, with at least one predicted token per sequence.

        Args:
          vocab_size: of the model.

        Returns:
          tokens int32 and loss_mask bool, each [batch, length].
        """
        tokens = (
            np.random.default_rng(0)
            .integers(0, vocab_size, (self.batch, self.length))
            .astype(np.int32)
        )
        first = min(max(1, round(self.masked * self.length)), self.length - 1)
        mask = np.broadcast_to(np.arange(self.length) >= first, tokens.shape)
        return {"tokens": tokens, "loss_mask": mask}


def peak_resident() -> float:
    """Peak resident memory of this process, in bytes. Linux's ru_maxrss would count the parent's,
    from which it was forked.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (
        found := re.search(
            r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8", errors="replace")
        )
    ):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
