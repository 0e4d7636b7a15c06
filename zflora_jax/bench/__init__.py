"""Benchmarks: everything that is compared takes turns within one process, compile time is left out, medians are reported (design.md section 8)."""

from zflora_jax.bench.latency import decode_latency

__all__ = ["decode_latency"]
