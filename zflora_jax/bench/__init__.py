"""Latency and training speed. All that is compared takes turns within one process, compile time is
left out, and medians are reported.

No runs: a measurement makes its own model.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `decode_latency` when it is asked for: PEFT's memory is measured without jax."""
    if name == "decode_latency":
        from zflora_jax.bench.latency import decode_latency

        return decode_latency
    raise AttributeError(name)
