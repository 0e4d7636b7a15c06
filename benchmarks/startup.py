"""Seconds from the command to the first training step and to the first generated token, without and
with a cache of compiled programs.

Command: python benchmarks/startup.py     (about 3 minutes on 2 CPU cores)
Writes results/startup.json and .md. SmolLM2-135M (the packaged one), float32. Training: `train.py
--config configs/quickstart.py`, until metrics.jsonl holds step 1. Token: a process that loads the
model and generates one token after a prompt. Each start is a process of its own; a warm one finds
the compiled programs of an earlier one, and files in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOKEN = """
import json, sys, time
start = time.perf_counter()
import zflora_jax as zf
from zflora_jax.parallel.compile_cache import compile_cache
import jax
zf.load_model, zf.generate, jax.devices()
imported = time.perf_counter()
with compile_cache(sys.argv[1]):
    model = zf.load_model("smollm2-135m", dtype="float32")
    jax.block_until_ready(model.params)
    loaded = time.perf_counter()
    zf.generate(model, ["The capital of France is"], max_new_tokens=1)
times = {"import": imported - start, "load": loaded - imported}
times["compile and run"] = time.perf_counter() - loaded
print(json.dumps(times), flush=True)
"""


def own_cache() -> dict[str, str]:
    """The environment without a compile cache that the user has set: cold would be warm."""
    return {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}


def first_step(workdir: Path) -> dict[str, float]:
    """Seconds of each part, and "total", of a new run in `workdir`."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        str(ROOT / "configs/quickstart.py"),
        "--workdir",
        str(workdir),
    ]
    start = time.perf_counter()
    command += ["--set", "train.steps=2", "optim.warmup_steps=1", "eval.limit=8"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=own_cache())
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.01)
    total = time.perf_counter() - start
    if process.wait(timeout=600) != 0:
        raise RuntimeError(f"train.py ended with {process.returncode}")
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    parts = {"load": report["load_seconds"], "tokenise the data": report["data_seconds"]}
    parts["compile and run"] = report["first_step_seconds"] - sum(parts.values())
    return {"import": total - report["first_step_seconds"], **parts, "total": total}


def first_token(cache: Path) -> dict[str, float]:
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", TOKEN, str(cache)],
        stdout=subprocess.PIPE,
        text=True,
        env=own_cache(),
    ) as process:
        line = process.stdout.readline() if process.stdout else ""
        total = time.perf_counter() - start  # its end is not waited for
    if not line:
        raise RuntimeError(f"the process that makes a token ended with {process.returncode}")
    parts: dict[str, float] = json.loads(line)
    parts["import"] += total - sum(parts.values())  # the interpreter itself
    return {**parts, "total": total}


def measure(repeats: int) -> dict[str, list[dict[str, float]]]:
    """Kind of start -> the seconds of its parts, turn by turn."""
    turns: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats):
            workdir = Path(folder) / f"run{turn}"
            turns.setdefault("first step, cold", []).append(first_step(workdir))
            # A new run in the same place: the cache's place is part of its keys.
            for path in workdir.iterdir():
                if path.name != "compile_cache":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            turns.setdefault("first step, warm", []).append(first_step(workdir))
            for kind in ("cold", "warm"):
                turns.setdefault(f"first token, {kind}", []).append(
                    first_token(Path(folder) / f"token{turn}")
                )
            print({kind: found[-1]["total"] for kind, found in turns.items()}, flush=True)
    return turns


def page(result: dict[str, Any]) -> str:
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    rows: list[dict[str, Any]] = []
    for kind, found in result["turns"].items():
        middle = {part: statistics.median(one[part] for one in found) for part in found[0]}
        totals = [one["total"] for one in found]
        row = {
            "": kind,
            "from command, s": f"{middle.pop('total'):.1f} [{min(totals):.1f}, {max(totals):.1f}]",
        }
        rows.append(row | {part: f"{seconds:.1f}" for part, seconds in middle.items()})
    columns = list(max(rows, key=len))
    return f"""# Start-up

Seconds from the command to the first training step and to the first generated token, without and
with a cache of compiled programs. SmolLM2-135M (the packaged one), float32. Training: `train.py
--config configs/quickstart.py`, until metrics.jsonl holds step 1. Token: a process that loads the
model and generates one token after a prompt. Each start is a process of its own; a warm one finds
the compiled programs of an earlier one, and files in the page cache. Medians of
{len(found)} [minimum, maximum]; parts in seconds.

{markdown_table([{name: row.get(name, "-") for name in columns} for row in rows], columns)}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="starts of each kind (default: 3)")
    parser.add_argument("--out", default="results/startup")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: give at least 1")
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    result = {"environment": environment(), "turns": measure(args.repeats)}
    write_result(args.out, result, page(result))
    print(page(result))


if __name__ == "__main__":
    main()
