"""Changing the task of a live model: zflora-minimal swaps blocks, LoRA is unmerged and merged.

Command: python benchmarks/task_switch.py     (about 3 minutes on 2 CPU cores)
Writes results/task_switch.json and .md: milliseconds and bytes of a change of task, compilations
during --swaps changes, and how many of the base's weights differ after them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import arguments, at_least, perturbed

from zflora_jax.adapters import fuse as fusing
from zflora_jax.adapters.fuse import fuse, swap, unfuse
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.experiments.latency import ratio, summary, turns
from zflora_jax.hf.load import load_model
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

RANK = 16


def products(
    adapters: trees.Tree, scale: float, *others: tuple[trees.Tree, float]
) -> dict[str, Any]:
    """Kernel's name -> scale A B, summed over the adapters by one product of joined factors."""
    flat = [(trees.flatten(tree), s) for tree, s in ((adapters, scale), *others)]
    names = {name.removesuffix("lora_a") for name in flat[0][0] if name.endswith("lora_a")}
    return {
        name + "kernel": (
            jnp.concatenate([s * f[name + "lora_a"] for f, s in flat], -1)
            @ jnp.concatenate([f[name + "lora_b"] for f, _ in flat], -2)
        )
        for name in names
    }


def added(params: trees.Tree, update: dict[str, Any]) -> trees.Tree:
    def visit(name: str, leaf: Any) -> Any:
        return (
            (leaf.astype(jnp.float32) + update[name].reshape(leaf.shape)).astype(leaf.dtype)
            if name in update
            else leaf
        )

    return trees.map_with_names(visit, params)


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def two_passes(params: trees.Tree, old: trees.Tree, new: trees.Tree, scale: float) -> trees.Tree:
    # As two calls would: not one rounding.
    without = jax.lax.optimization_barrier(added(params, products(old, -scale)))
    return added(without, products(new, scale))


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def one_pass(params: trees.Tree, old: trees.Tree, new: trees.Tree, scale: float) -> trees.Tree:
    return added(params, products(old, -scale, (new, scale)))


def changed(got: trees.Tree, want: trees.Tree) -> dict[str, float]:
    """Returns the share of the base's weights that changed, and the largest change."""
    have, kept = trees.flatten(got), trees.flatten(want)
    pairs = [
        (np.asarray(have[name], np.float32), np.asarray(leaf, np.float32))
        for name, leaf in kept.items()
    ]
    return {
        "changed_share": sum(int((a != b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs),
        "changed_by": max(float(np.abs(a - b).max()) for a, b in pairs),
    }


PACKED, STACKED, TWO, ONE = (
    "zflora-minimal, packed for decode: swap",
    "zflora-minimal, layers stacked: swap",
    "LoRA: unmerge, then merge",
    "LoRA: both in one pass",
)


class LiveModels:
    """Four copies of one base, each with one of two tasks in its kernels."""

    def __init__(self, dtype: str, name: str) -> None:
        self.base = load_model(name, dtype=dtype)
        minimal, lora = (
            AdapterConfig(method, rank=RANK, alpha=2 * RANK)
            for method in ("zflora-minimal", "lora")
        )
        self.blocks, self.factors = (
            [perturbed(self.base, adapter, seed) for seed in (0, 1)] for adapter in (minimal, lora)
        )
        self.minimal = minimal
        fused = fuse(self.base, minimal, self.blocks[0])
        self.live = {PACKED: pack_for_decode(fused), STACKED: fused}
        self.merged = {label: fuse(self.base, lora, self.factors[0]).params for label in (TWO, ONE)}
        self.task = dict.fromkeys((PACKED, STACKED, TWO, ONE), 0)  # the task each holds

    def change(self, label: str) -> None:
        now = self.task[label] = 1 - self.task[label]
        if label in self.live:
            self.live[label] = swap(self.live[label], self.blocks[now])
            jax.block_until_ready(self.live[label].params)
        else:
            passes = two_passes if label == TWO else one_pass
            self.merged[label] = jax.block_until_ready(
                passes(self.merged[label], self.factors[1 - now], self.factors[now], 2.0)
            )

    def left(self) -> dict[str, dict[str, float]]:
        """Label -> how the base differs after the changes."""
        for label in self.live:
            if self.task[label]:
                self.change(label)
        packed = pack_for_decode(fuse(self.base, self.minimal, self.blocks[0]))
        found = {
            STACKED: changed(unfuse(self.live[STACKED])[0].params, self.base.params),
            PACKED: changed(self.live[PACKED].params, packed.params),
        }
        for label, params in self.merged.items():
            # taken out once more: a switch back to the bare base
            bare = added(params, products(self.factors[self.task[label]], -2.0))
            found[label] = changed(bare, self.base.params)
        return found


def measure(dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    models = LiveModels(dtype, args.model)
    for label in models.task:
        models.change(label)
    times: dict[str, list[float]] = {label: [] for label in models.task}
    for label in turns(list(times), args.repeats):
        start = time.perf_counter()
        models.change(label)
        times[label].append(1e3 * (time.perf_counter() - start))
    compiled: Callable[[], int] = lambda: fusing._swap._cache_size()  # noqa: E731
    before, compilations = compiled(), dict.fromkeys(times, 0)
    for label in times:
        for _ in range(args.swaps if label in models.live else args.lora_changes):
            models.change(label)
        if label in models.live:
            compilations[label] = compiled() - before
    left, written = models.left(), written_bytes(models, dtype)
    rows = []
    for label, own in times.items():
        row = {"dtype": dtype, "": label} | summary(own, "ms")
        row |= {
            "ratio": ratio(own, times[PACKED]),
            "written_bytes": written[label],
            "changes": args.swaps if label in models.live else args.lora_changes,
            "compilations": compilations[label],
        }
        rows.append(row | left[label])
        print(rows[-1], flush=True)
    return rows


def written_bytes(models: LiveModels, dtype: str) -> dict[str, int]:
    """Bytes that a change of task writes, by label."""
    blocks = trees.size(models.blocks[0]) * jnp.dtype(dtype).itemsize
    kernels = sum(
        leaf.nbytes
        for name, leaf in trees.flatten(models.base.params).items()
        if name.startswith("layers") and name.endswith("kernel")
    )
    return {PACKED: blocks, STACKED: blocks, TWO: 2 * kernels, ONE: kernels}


def page(result: dict[str, Any]) -> str:
    shown = [
        {
            "dtype": row["dtype"],
            "": row[""],
            "ms": f"{row['ms']:.1f} [{row['ms_min']:.1f}, {row['ms_max']:.1f}]",
            "x swap of packed": f"{row['ratio']:.2f}",
            "written, MB": f"{row['written_bytes'] / 1e6:.1f}",
            "changes": row["changes"],
            "compilations during them": row["compilations"],
            "base weights changed": f"{row['changed_share']:.2%}",
            "by at most": f"{row['changed_by']:.1e}",
        }
        for row in result["rows"]
    ]
    return f"""# Changing the task of a live model

**Swapping zflora-minimal's blocks leaves the base bit for bit. Unmerging one LoRA and merging
another writes every kernel and changes last bits of the base.**

{markdown_table(shown, list(shown[0]))}

SmolLM2-135M, two sets of perturbed adapters of rank {RANK} on all kernels. Medians of
{result["settings"]["repeats"]} turns [minimum, maximum] in one process; x swap of packed: median of
the ratio within a turn. LoRA, two passes: W <- W - s A B, then W <- W + s A' B', as PEFT does. One
pass: both products as one. Both are compiled, with donated buffers.

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = arguments(__doc__, "task_switch")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--swaps", type=int, default=1000, help="changes of task before the check")
    parser.add_argument("--lora-changes", type=int, default=100, help="the same for LoRA")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns")
    args = parser.parse_args()
    at_least(parser, args, swaps=1, lora_changes=1, repeats=1)
    env = environment()
    rows = [row for dtype in ("float32", "bfloat16") for row in measure(dtype, args)]
    result = {
        "rows": rows,
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "environment": env,
    }
    write_result(args.out, result, page(result))


if __name__ == "__main__":
    main()
