"""Changing the task of a live model: zflora-minimal's swap of blocks against LoRA taken out of the
kernels and another put in.

Command: python benchmarks/task_switch.py     (about 3 minutes on 2 CPU cores)
SmolLM2-135M (the packaged one), two sets of adapters moved by noise, on all kernels, by turns in
one process. Writes results/task_switch.json and .md: milliseconds and bytes of a change of task,
compilations during --swaps changes, and what is left of the base's bits after them.

LoRA, two passes: W <- W - s A B, then W <- W + s A' B', as PEFT's unmerge and merge do. One pass:
both products as one, added at once: the fastest form that we know. Both are compiled, with donated
buffers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zflora_jax.adapters import swapping
from zflora_jax.adapters.fuse import fuse, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.adapters.swapping import swap
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.hf.load import load_model
from zflora_jax.reporting.files import atomic_write, write_json
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

RANK = 16


def two_tasks(model: Model, adapter: AdapterConfig) -> list[trees.Tree]:
    def moved(seed: int) -> trees.Tree:
        tree = init_adapters(jax.random.key(seed), model, adapter)
        leaves, form = jax.tree.flatten(tree)
        keys = jax.random.split(jax.random.key(seed + 10), len(leaves))
        return form.unflatten(
            [
                leaf + 0.01 * jax.random.normal(key, leaf.shape)
                for key, leaf in zip(keys, leaves, strict=True)
            ]
        )

    return [moved(0), moved(1)]


def products(
    adapters: trees.Tree, scale: float, *others: tuple[trees.Tree, float]
) -> dict[str, Any]:
    """Kernel's name -> scale A B, summed over the given adapters as one product of factors side by
    side.
    """
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
    """What became of the base: the share of its numbers that changed, and by how much at most."""
    have, kept = trees.flatten(got), trees.flatten(want)
    pairs = [
        (np.asarray(have[name], np.float32), np.asarray(leaf, np.float32))
        for name, leaf in kept.items()
    ]
    return {
        "changed_share": sum(int((a != b).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs),
        "changed_by": max(float(np.abs(a - b).max()) for a, b in pairs),
    }


def measure(dtype: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    base = load_model(args.model, dtype=dtype)
    minimal, lora = (
        AdapterConfig(method, rank=RANK, alpha=2 * RANK) for method in ("zflora-minimal", "lora")
    )
    blocks, factors = two_tasks(base, minimal), two_tasks(base, lora)
    fused = fuse(base, minimal, blocks[0])
    live = {"minimal": pack_for_decode(fused), "minimal, one subtree of stacked layers": fused}
    merged = {
        "two": fuse(base, lora, factors[0]).params,
        "one": fuse(base, lora, factors[0]).params,
    }
    at = dict.fromkeys((*live, *merged), 0)  # which task each holds

    def change(label: str) -> None:
        now = at[label] = 1 - at[label]
        if label in live:
            live[label] = swap(live[label], blocks[now])
            jax.block_until_ready(live[label].params)
        else:
            merged[label] = jax.block_until_ready(
                (two_passes if label == "two" else one_pass)(
                    merged[label], factors[1 - now], factors[now], 2.0
                )
            )

    for label in at:
        change(label)
    times: dict[str, list[float]] = {label: [] for label in at}
    for turn in range(args.repeats):
        for label in list(at)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            change(label)
            times[label].append(1e3 * (time.perf_counter() - start))

    compiled: Callable[[], int] = lambda: swapping._swap._cache_size()  # noqa: E731
    before, counts = compiled(), {}
    for label in live:
        for _ in range(args.swaps):
            change(label)
        counts[label] = compiled() - before
    for label in merged:
        for _ in range(args.lora_changes):
            change(label)
    if at["minimal, one subtree of stacked layers"]:
        change("minimal, one subtree of stacked layers")
    left = {
        "minimal, one subtree of stacked layers": changed(
            unfuse(live["minimal, one subtree of stacked layers"])[0].params, base.params
        )
    }
    if at["minimal"]:
        change("minimal")
    left["minimal"] = changed(
        live["minimal"].params, pack_for_decode(fuse(base, minimal, blocks[0])).params
    )
    for (
        label,
        params,
    ) in merged.items():  # taken out once more: what a switch back to the bare base gives
        left[label] = changed(added(params, products(factors[at[label]], -2.0)), base.params)
    kernels = sum(
        leaf.nbytes
        for name, leaf in trees.flatten(base.params).items()
        if name.startswith("layers") and name.endswith("kernel")
    )
    itemsize = jnp.dtype(dtype).itemsize
    names = {
        "minimal": "zflora-minimal, packed for decode: swap",
        "minimal, one subtree of stacked layers": "zflora-minimal, layers stacked: swap",
        "two": "LoRA: unmerge, then merge",
        "one": "LoRA: both in one pass",
    }
    for label in at:
        written = (
            trees.size(blocks[0]) * itemsize
            if label in live
            else kernels * (2 if label == "two" else 1)
        )
        ratio = statistics.median(
            t / own for t, own in zip(times[label], times["minimal"], strict=True)
        )
        row = {
            "dtype": dtype,
            "": names[label],
            "ms": statistics.median(times[label]),
            "ms_min": min(times[label]),
            "ms_max": max(times[label]),
        }
        row |= {
            "ratio": ratio,
            "written_bytes": written,
            "changes": args.swaps if label in live else args.lora_changes,
        }
        rows.append(row | {"compilations": counts.get(label, 0)} | left[label])
        print(row, left[label], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--swaps",
        type=int,
        default=1000,
        help="changes of task before the base is looked at (default: 1000)",
    )
    parser.add_argument(
        "--lora-changes",
        type=int,
        default=100,
        help="the same of LoRA, each of which writes every kernel (default: 100)",
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed turns (default: 15)")
    parser.add_argument("--out", default="results/task_switch")
    args = parser.parse_args()
    env = environment()
    rows = [row for dtype in ("float32", "bfloat16") for row in measure(dtype, args)]
    shown = [
        {
            "dtype": row["dtype"],
            "": row[""],
            "ms": f"{row['ms']:.1f} [{row['ms_min']:.1f}, {row['ms_max']:.1f}]",
            "x swap of packed": f"{row['ratio']:.2f}",
            "to write, MB": f"{row['written_bytes'] / 1e6:.1f}",
            "changes": row["changes"],
            "compilations during them": row["compilations"],
            "base numbers changed": f"{row['changed_share']:.2%}",
            "by at most": f"{row['changed_by']:.1e}",
        }
        for row in rows
    ]
    lines = ["# Changing the task of a live model", "", *(__doc__ or "").splitlines()[3:], ""]
    lines[2:2] = [
        (
            f"Rank {RANK}. Medians of {args.repeats} turns [least, most]; x: median over turns of"
            " the ratio within a turn."
        ),
        "",
    ]
    write_json(f"{args.out}.json", {"rows": rows, "settings": vars(args), "environment": env})
    atomic_write(
        f"{args.out}.md",
        "\n".join(
            [*lines, markdown_table(shown, list(shown[0])), "", origin_line(env), ""]
        ).encode(),
    )


if __name__ == "__main__":
    main()
