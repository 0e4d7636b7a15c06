"""Latency and training speed: everything that is compared takes turns within one process,
compile time is left out, and medians are reported.

No runs: a measurement makes its own model.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`decode_latency`, imported when it is asked for: what measures PEFT's memory must not have
    jax in it.
    """
    if name == "decode_latency":
        from zflora_jax.bench.latency import decode_latency

        return decode_latency
    raise AttributeError(name)
