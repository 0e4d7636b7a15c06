"""This checkout against another one: a training step, decode and export on this machine, by turns,
each turn in a separate process.

Command: git worktree add ../before COMMIT && python benchmarks/against.py --other ../before
(about 12 minutes on 2 CPU cores)
Writes results/against-<dtype>.json and .md. SmolLM2-135M; a step is one row of 512 tokens with loss
on the last 60% of them, rank 16; decode is the time per token of the packed base; export writes the
fused zflora-minimal model.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import ROOT, arguments, at_least

STEPS, LENGTH, PREDICTED = 6, 512, 0.6
METHODS = ("lora", "zflora-minimal", "full")
DECODE = ((1, 64), (16, 128), (64, 128))  # batch, prompt length


def measure(dtype: str) -> dict[str, float]:
    """Name -> milliseconds, by the zflora_jax that is imported first."""
    import jax
    import numpy as np

    import zflora_jax as zf
    from zflora_jax.adapters.init import init_adapters

    try:
        from zflora_jax.experiments.latency import decode_latency
    except ImportError:  # a checkout from before it moved
        from zflora_jax.bench.latency import decode_latency
    from zflora_jax.training.trainer import init_state, make_train_step

    checkout = Path(os.environ["PYTHONPATH"])
    if not Path(zf.__file__).is_relative_to(checkout):
        raise RuntimeError(f"measured would be {zf.__file__}, which is not in {checkout}")
    model, found = zf.load_model("smollm2-135m", dtype=dtype), {}
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, model.config.vocab_size, (1, LENGTH)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "loss_mask": np.arange(LENGTH)[None] >= (1 - PREDICTED) * LENGTH,
        "segments": np.ones_like(tokens),
    }
    for method in METHODS:
        adapter = zf.AdapterConfig(method, rank=16)
        state = init_state(init_adapters(jax.random.key(0), model, adapter), zf.OptimConfig(), 100)
        step = make_train_step(model.config, adapter, zf.OptimConfig(), 100)
        seconds = []
        for _ in range(STEPS + 1):
            start = time.perf_counter()
            state, metrics = step(model.params, state, batch)
            float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
        # The first one compiles.
        found[f"training step, {method}"] = 1e3 * statistics.median(seconds[1:])
    for rows, length in DECODE:
        timed = decode_latency(
            {"base": model}, batch=rows, prompt_length=length, new_tokens=32, repeats=3
        )["base"]
        found[f"decode of a token, {rows} rows after {length} tokens"] = timed["tpot_ms"]
    adapter, seconds = zf.AdapterConfig("zflora-minimal", rank=16), []
    fused = zf.fuse(model, adapter, init_adapters(jax.random.key(0), model, adapter))
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(3):
            start = time.perf_counter()
            zf.save_hf(f"{folder}/{repeat}", fused)
            seconds.append(time.perf_counter() - start)
    return found | {"export": 1e3 * statistics.median(seconds)}


def turn(checkout: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", "--dtype", dtype]
    env = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    return json.loads(
        subprocess.run(
            command, check=True, capture_output=True, text=True, env=env, timeout=900
        ).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = arguments(__doc__, "against")
    parser.add_argument("--other", metavar="DIR", help="a checkout of another commit")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help="one turn: print its JSON and end")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.dtype)))
        return
    at_least(parser, args, rounds=1)
    if not args.other or not (Path(args.other) / "zflora_jax").is_dir():
        parser.error(
            f"--other {args.other}: expected a checkout of this repository, as `git worktree add"
            " DIR COMMIT` makes one"
        )
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment, origin_line
    from zflora_jax.reporting.tables import markdown_table

    env = environment()
    other = subprocess.run(
        ["git", "-C", args.other, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    turns: dict[str, list[dict[str, float]]] = {"this": [], "other": []}
    for _ in range(args.rounds):
        for side, checkout in (("other", Path(args.other)), ("this", ROOT)):
            turns[side].append(turn(checkout, args.dtype))
    rows: list[dict[str, Any]] = []
    for name in turns["this"][0]:
        times = {side: [found[name] for found in turns[side]] for side in turns}
        middle = {side: statistics.median(values) for side, values in times.items()}
        shown = {
            f"{side}, ms": f"{middle[side]:.1f} ({min(times[side]):.1f}-{max(times[side]):.1f})"
            for side in ("other", "this")
        }
        rows.append(
            {"what": name} | shown | {"this / other": round(middle["this"] / middle["other"], 3)}
        )
    out = args.out.with_name(f"{args.out.name}-{args.dtype}")
    page = (
        f"# {args.dtype}: this commit against {other[:7]}\n\nMedians of {args.rounds} turns each,"
        " in turns (least and most in brackets).\n\n"
    )
    page += markdown_table(rows, list(rows[0]))
    page += f"\n\n{origin_line(env)} The other commit: {other}.\n"
    result = {"rows": rows, "turns": turns, "other_commit": other, "environment": env}
    write_result(out, result, page)
    print(page)


if __name__ == "__main__":
    main()
