"""What the benchmarks share: timing by turns, medians, and the machine's read bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Contender:
    """Something that decodes.

    Attributes:
      generate: n -> makes n tokens after its prompt and returns when they are computed; n is one of
        the counts that it was compiled for.
      read_bytes: average bytes of weights and cache that a step reads; None: unknown.
      extra: more values to report.
    """

    generate: Callable[[int], object]
    read_bytes: int | None = None
    extra: dict[str, float] = field(default_factory=dict)


def turns(labels: Sequence[str], repeats: int) -> Iterator[str]:
    """Yield every label once per turn. Every other turn goes backwards, so that no label always
    follows the same one.

    Args:
      labels: of what is compared.
      repeats: turns.
    """
    for turn in range(repeats):
        yield from labels[:: 1 if turn % 2 == 0 else -1]


def decode_turns(
    contenders: Mapping[str, Contender],
    new_tokens: int,
    repeats: int,
    measure_bandwidth: Callable[[], float] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Time contenders by turns, after one call of each that is not counted.

    A turn times for each contender a call that makes 1 token (TTFT: prefill and the first token)
    and one that makes `new_tokens`; TPOT is their difference over new_tokens - 1.

    Args:
      contenders: by label.
      new_tokens: at least 2.
      repeats: turns.
      measure_bandwidth: returns bytes/s; it is called just before each contender, because other
        processes use the memory too.

    Returns:
      Label -> {"ttft_ms", "tpot_ms"}, one value per turn; with `measure_bandwidth` and read_bytes
      also "floor_ms", the time to read those bytes.
    """
    found = {label: {"ttft_ms": list[float](), "tpot_ms": list[float]()} for label in contenders}
    for contender in contenders.values():
        for count in (1, new_tokens):
            contender.generate(count)
    for label in turns(list(contenders), repeats):
        size = contenders[label].read_bytes
        if measure_bandwidth and size is not None:
            found[label].setdefault("floor_ms", []).append(1e3 * size / measure_bandwidth())
        first = _milliseconds(contenders[label], 1)
        found[label]["ttft_ms"].append(first)
        found[label]["tpot_ms"].append(
            (_milliseconds(contenders[label], new_tokens) - first) / (new_tokens - 1)
        )
    return found


def _milliseconds(contender: Contender, count: int) -> float:
    start = time.perf_counter()
    contender.generate(count)
    return 1e3 * (time.perf_counter() - start)


def summary(values: Sequence[float], name: str) -> dict[str, float]:
    """Median, least and most, as `name`, `name`_min and `name`_max.

    Args:
      values: one per turn.
      name: of the result.
    """
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def ratio(values: Sequence[float], to: Sequence[float]) -> float:
    """The median over turns of `ratios`.

    Args:
      values: one per turn.
      to: one per turn.
    """
    return statistics.median(ratios(values, to))


def ratios(values: Sequence[float], to: Sequence[float]) -> list[float]:
    """The ratio within each turn: a slow turn slows both.

    Args:
      values: one per turn.
      to: one per turn.
    """
    return [a / b for a, b in zip(values, to, strict=True)]


def bandwidth_meter(size: int = 2**30, repeats: int = 4) -> Callable[[], float]:
    """Make a measurement of the default device's read bandwidth, to be called as often as needed.

    Args:
      size: bytes of float32 that are read; they stay allocated.
      repeats: the best of so many.

    Returns:
      A function that returns bytes per second: the best of sums, and of matrix-vector products,
      over these bytes.
    """
    rows = jnp.ones((size // 4 // 4096, 4096), jnp.float32)
    vector = jnp.ones((4096,), jnp.float32)
    ways = (jax.jit(lambda x, v: jnp.sum(x)), jax.jit(lambda x, v: x @ v))
    for run in ways:
        jax.block_until_ready(run(rows, vector))

    def measure() -> float:
        best = 0.0
        for run in ways * repeats:
            start = time.perf_counter()
            jax.block_until_ready(run(rows, vector))
            best = max(best, rows.nbytes / (time.perf_counter() - start))
        return best

    return measure
