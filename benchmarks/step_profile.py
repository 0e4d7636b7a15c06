"""Where the time of a training step goes on a CPU, and what its form changes.

Command: python benchmarks/step_profile.py     (about 5 minutes on 2 idle CPU cores)
SmolLM2-135M, LoRA r=16, 1024 tokens a step, loss on the second half of every row; medians of steps
that the forms take by turns. Products: the time that jax's profiler counts for XLA's operations of
products (of one core; those of two cores at one time count twice). Two processes: the same step in
two processes of one core each, tokens of both together. Writes results/step_profile.json and .md.
"""

from __future__ import annotations

import argparse
import glob
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

FORMS = {  # name -> dtype, rows, length, remat
    "bfloat16, 8 x 128": ("bfloat16", 8, 128, "dots"),
    "bfloat16, 2 x 512": ("bfloat16", 2, 512, "dots"),
    "bfloat16, 8 x 128, remat=none": ("bfloat16", 8, 128, "none"),
    "float32, 8 x 128": ("float32", 8, 128, "dots"),
}
FIRST = "bfloat16, 8 x 128"
TOKENS = 1024
PRODUCTS = ("ynn", "dot", "custom-call")


def step_of(dtype: str, rows: int, length: int, remat: str) -> Callable[[], float]:
    """A function that trains one step and returns its loss."""
    from zflora_jax.bench.case import Case
    from zflora_jax.bench.training_step import load, our_step
    from zflora_jax.core.model import Model

    case = Case("smollm2-135m", dtype=dtype, batch=rows, length=length, masked=0.5)
    model = load(case)
    step = our_step(case, Model(model.config.replace(remat=remat), model.params), "lora")
    step()  # compiles it
    return step


def seconds(step: Callable[[], float]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def products(step: Callable[[], float]) -> float:
    """Seconds of one step that go to products, by the profiler."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        [file] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(file).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
    return sum(e.duration_ns for e in events if e.name.startswith(PRODUCTS)) / 1e9


def together(turns: int) -> float:
    """Tokens per second of two processes, each with the first form on a core of its own."""
    processes = []
    for core in sorted(os.sched_getaffinity(0))[:2]:
        words = [sys.executable, os.path.abspath(__file__), "--one", "--turns", str(turns)]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE))
        os.sched_setaffinity(processes[-1].pid, {core})
    took = [float(process.communicate()[0].split()[-1]) for process in processes]
    return sum(TOKENS / value for value in took)


def page(result: dict[str, Any]) -> str:
    """The page of a result file's content."""
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    rows, first = result["rows"], result["rows"][0]
    rates = ", ".join(f"{k} {v / 1e12:.2f}" for k, v in result["matmul_flops"].items())
    return f"""# Where a training step's time goes, on a CPU

SmolLM2-135M, LoRA r=16 on all kernels, {TOKENS} tokens a step, loss on half of them; medians of
{result["turns"]} turns. "products": seconds that jax's profiler counts for XLA's products, of
all cores together. Two processes of one core each, with the form of the first row, train
{result["together"]:.0f} tokens a second together, one process of two cores {first["tokens/s"]:.0f}.
Square matrices of 2048 are multiplied at (TFLOP/s): {rates}.

{markdown_table(rows, list(first))}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="results/step_profile")
    args = parser.parse_args()
    if args.turns < 1:
        parser.error(f"--turns {args.turns}: give at least 1")
    if args.one:
        step = step_of(*FORMS[FIRST])
        print(statistics.median(seconds(step) for _ in range(args.turns)))
        return
    from zflora_jax.bench.timing import ratio, turns
    from zflora_jax.bench.training_step import matmul_rate
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    steps = {name: step_of(*form) for name, form in FORMS.items()}
    took: dict[str, list[float]] = {name: [] for name in FORMS}
    for name in turns(list(FORMS), args.turns):
        took[name].append(seconds(steps[name]))
    rows = [
        {
            "step": name,
            "seconds": statistics.median(took[name]),
            "x first": ratio(took[name], took[FIRST]),
            "tokens/s": TOKENS / statistics.median(took[name]),
            "products": products(steps[name]),
        }
        for name in FORMS
    ]
    rates = {dtype: matmul_rate(dtype) for dtype in ("float32", "bfloat16")}
    steps.clear()  # the two processes need the memory
    result = {
        "rows": rows,
        "together": together(args.turns),
        "matmul_flops": rates,
        "turns": args.turns,
        "environment": environment(),
    }
    write_result(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
