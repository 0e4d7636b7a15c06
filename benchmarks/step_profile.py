"""Where the time of a training step goes on a CPU, and what its form changes.

Command: python benchmarks/step_profile.py     (about 5 minutes on 2 idle CPU cores)
SmolLM2-135M, LoRA r=16, 1024 tokens a step, loss on the second half of every row. Forms: medians of
steps that they take by turns. Two processes: the first form in two processes of one core each,
which begin their steps together; tokens of both. Parts: what jax's profiler counts for every
operation of one step of a process of one core, by the name that the operation has in the compiled
program, beside the median of steps without the profiler. Writes results/step_profile.json and .md.
"""

from __future__ import annotations

import argparse
import collections
import glob
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zflora_jax.bench.case import Case
    from zflora_jax.core.model import Model

FORMS = {  # name -> dtype, rows, length, remat
    "bfloat16, 8 x 128": ("bfloat16", 8, 128, "dots"),
    "bfloat16, 2 x 512": ("bfloat16", 2, 512, "dots"),
    "bfloat16, 8 x 128, remat=none": ("bfloat16", 8, 128, "none"),
    "float32, 8 x 128": ("float32", 8, 128, "dots"),
}
FIRST = "bfloat16, 8 x 128"
TOKENS = 1024
# Parts of a step: the first whose pattern is found in an operation's name has it.
PARTS = {
    "head and loss": r"Llama\.logits|jvp\(\)/while",
    "adapters": r"_with_lora",
    "base kernels": r"\._product/dot_general",
    "attention": r"/attn/",
    "rest: norms, SiLU, conversions, optimizer": "",
}
CONTAINERS = ("while", "cond", "call", "Thunk")  # count what is in them once more


def loaded(dtype: str, rows: int, length: int, remat: str) -> tuple[Case, Model]:
    """What a form trains on, and the model that it trains."""
    from zflora_jax.bench.case import Case
    from zflora_jax.bench.training_step import load
    from zflora_jax.core.model import Model

    case = Case("smollm2-135m", dtype=dtype, batch=rows, length=length, masked=0.5)
    model = load(case)
    return case, Model(model.config.replace(remat=remat), model.params)


def step_of(*form: Any) -> Callable[[], float]:
    """A function that trains one step and returns its loss."""
    from zflora_jax.bench.training_step import our_step

    step = our_step(*loaded(*form), "lora")
    step()  # compiles it
    return step


def seconds(step: Callable[[], Any]) -> float:
    """Of one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def events(step: Callable[[], Any]) -> collections.Counter[str]:
    """Seconds of every operation of one step, by the profiler."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        [file] = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(file).planes
        took: collections.Counter[str] = collections.Counter()
        for event in (event for plane in planes for line in plane.lines for event in line.events):
            took[event.name] += event.duration_ns / 1e9
    return took


def parts(turns: int, *form: Any) -> dict[str, float]:
    """Seconds of one step by `PARTS`, and of a whole one, the median of `turns` unprofiled."""
    import jax

    from zflora_jax.bench.training_step import training_case

    case, model = loaded(*form)
    step, state, batch = training_case(case, model, "lora")
    compiled = step.lower(model.params, state, batch).compile()  # type: ignore[attr-defined]
    written = re.findall(r"%([\w.\-]+) = .*?(?:op_name=\"([^\"]*)\"|$)", compiled.as_text(), re.M)
    names = dict(written)

    def one() -> None:
        nonlocal state  # the step takes its memory
        state, _ = jax.block_until_ready(compiled(model.params, state, batch))

    one()
    whole = statistics.median(seconds(one) for _ in range(turns))
    took = events(one)
    summed = dict.fromkeys(PARTS, 0.0)
    for name, value in took.items():
        if name in names and not name.startswith(CONTAINERS):
            summed[next(k for k, p in PARTS.items() if re.search(p, names[name]))] += value
    if empty := [name for name, value in summed.items() if not value]:
        sys.exit(f"no operation is called as {', '.join(empty)} should be: mend PARTS")
    return summed | {"whole": whole}


def together(turns: int) -> float:
    """Tokens per second of two processes, each with the first form on a core of its own. Each says
    that it is ready, and begins its steps when both are.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    processes = [on_core(core, "--one", "--turns", str(turns)) for core in cores]
    for process in processes:
        process.stdout.readline()  # type: ignore[union-attr]
    with ThreadPoolExecutor(len(processes)) as pool:
        took = list(pool.map(answer, processes))
    return sum(TOKENS / float(value) for value in took)


def on_core(core: int, *words: str) -> subprocess.Popen[bytes]:
    """This script with `words` in a process that has one core."""
    process = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    os.sched_setaffinity(process.pid, {core})
    return process


def answer(process: subprocess.Popen[bytes]) -> str:
    """The last line that a process prints once it is told to go on; ends with a message where it
    failed.
    """
    printed = process.communicate(b"\n")[0].decode()
    if process.returncode:
        sys.exit(f"a process of one core ended with {process.returncode}; what it said is above")
    return printed.splitlines()[-1]


def page(result: dict[str, Any]) -> str:
    """The page of a result file's content."""
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    rows, first, took = result["rows"], result["rows"][0], result["parts"]
    rates = ", ".join(f"{k} {v / 1e12:.2f}" for k, v in result["matmul_flops"].items())
    shares = [
        {"part": name, "seconds": value, "share": value / took["whole"]}
        for name, value in took.items()
    ]
    return f"""# Where a training step's time goes, on a CPU

SmolLM2-135M, LoRA r=16 on all kernels, {TOKENS} tokens a step, loss on half of them; medians of
{result["turns"]} turns.

{markdown_table(rows, list(first))}

Two processes of one core each, with the form of the first row, train {result["together"]:.0f}
tokens a second together, one process of two cores {first["tokens/s"]:.0f}. Square matrices of 2048
are multiplied at (TFLOP/s, two cores): {rates}.

Parts of one step of the first row's form in a process of one core, by jax's profiler; "base
kernels" are the products with the frozen kernels, forward and backward; "whole" is a step without
the profiler.

{markdown_table(shares, ["part", "seconds", "share"])}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="results/step_profile")
    args = parser.parse_args()
    if args.turns < 1:
        parser.error(f"--turns {args.turns}: give at least 1")
    if args.one:
        step = step_of(*FORMS[FIRST])
        print("ready", flush=True)
        sys.stdin.readline()
        print(statistics.median(seconds(step) for _ in range(args.turns)))
        return
    if args.parts:
        print(json.dumps(parts(args.turns, *FORMS[FIRST])))
        return
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        parser.error("needs Linux and two cores, one for each of two processes")
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
        }
        for name in FORMS
    ]
    cores = sorted(os.sched_getaffinity(0))
    rates = {dtype: matmul_rate(dtype) for dtype in ("float32", "bfloat16")}
    steps.clear()  # the two processes need the memory
    result = {
        "rows": rows,
        "together": together(args.turns),
        "parts": json.loads(answer(on_core(cores[0], "--parts", "--turns", str(args.turns)))),
        "matmul_flops": rates,
        "turns": args.turns,
        "environment": environment(),
    }
    write_result(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
