"""Latency and training speed. All that is compared takes turns within one process, compile time is
left out, and medians are reported.

No runs: a measurement makes its own model. Nothing is imported here: PEFT's memory is measured
without jax.
"""
