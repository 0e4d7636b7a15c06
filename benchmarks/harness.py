"""Shared by the benchmarks: their arguments, perturbed adapters, read bandwidth, results and pages.

Turns, medians and ratios are those of `zflora_jax.experiments.latency`. Nothing here imports jax
before it is used, so a script can configure it first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The parser of a script with its docstring and --out, by default results/<name>."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = f"PATH.json and PATH.md are written (default: results/{name})"
    parser.add_argument("--out", type=Path, default=RESULTS / name, metavar="PATH", help=text)
    return parser


def at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """Ends with a message if an option, or a value in its list, is below its least value."""
    for name, limit in least.items():
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < limit:
            parser.error(f"--{name.replace('_', '-')} {value}: give at least {limit}")


def write_part(
    out: Path, part: str, found: Any, page: Callable[[Mapping[str, Any]], str]
) -> dict[str, Any]:
    """Writes the values `found` of one part of a result with its environment to <out>.json, and the
    page; other parts stay. Returns the whole result: part -> values, and "environments": part ->
    environment.
    """
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    file = Path(f"{out}.json")
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    result = {"environments": {}} | old | {part: found}
    result["environments"][part] = environment()
    write_result(out, result, page(result))
    return result


def origins(result: Mapping[str, Any], part: str) -> str:
    """Returns the origin lines of a part of a result, whose rows may be of several runs."""
    from zflora_jax.reporting.provenance import origin_line

    found = result["environments"].get(part, [])
    return "\n\n".join(map(origin_line, found if isinstance(found, list) else [found]))


def perturbed(model: Any, adapter: Any, seed: int = 1) -> Any:
    """Adapters that differ from zero everywhere."""
    import jax

    import zflora_jax as zf

    leaves, tree = jax.tree.flatten(zf.init_adapters(jax.random.key(seed), model, adapter))
    keys = jax.random.split(jax.random.key(seed + 10), len(leaves))
    noisy = [x + 0.01 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return tree.unflatten(noisy)


def bandwidth_meter(size: int = 2**30, repeats: int = 4) -> Callable[[], float]:
    """A function that measures the default device's read bandwidth in bytes per second: the best of
    `repeats` sums and matrix-vector products over `size` bytes of float32, which stay allocated.
    """
    import jax
    import jax.numpy as jnp

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
