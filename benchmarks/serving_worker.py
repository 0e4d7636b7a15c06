"""The worker extension of a server that benchmarks/serving.py measures."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch

from zflora_vllm.worker import Tasks


class WatchedTasks(Tasks):
    """Tasks whose writes are timed, and whose weights can be compared."""

    def zflora_use(self, name: str) -> str:
        start = time.perf_counter()
        found = super().zflora_use(name)
        milliseconds = 1e3 * (time.perf_counter() - start)
        self.__dict__.setdefault("zflora_times", []).append(milliseconds)
        return found

    def zflora_take_times(self) -> list[float]:
        """The milliseconds of each write since the last call."""
        return self.__dict__.pop("zflora_times", [])

    def zflora_weights(self) -> str:
        """The hash (sha256) of all weights."""
        model: Any = self.model_runner.model  # type: ignore[attr-defined]
        found = hashlib.sha256()
        for name, weight in sorted(model.state_dict().items()):
            found.update(name.encode())
            found.update(weight.cpu().flatten().view(torch.uint8).numpy())
        return found.hexdigest()
