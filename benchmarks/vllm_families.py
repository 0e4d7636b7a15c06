"""Do fused exports of every family answer in vLLM (its CPU build) as they do here?

Command: python benchmarks/vllm_families.py --vllm-python DIR/bin/python
(a few minutes on 2 CPU cores; DIR as benchmarks/vllm_latency.py says)
Writes results/vllm_families.json and .md: for each family a small model with random weights, its
exports after zflora-minimal and zflora-uniform with adapters moved by noise, and 24 greedy tokens
of four prompts, float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

METHODS = ("zflora-minimal", "zflora-uniform")
NEW_TOKENS, PROMPTS = 24, 4


def in_vllm(python: str, job: dict[str, Any]) -> list[list[int]] | str:
    """Greedy tokens of a model directory; a text where vLLM refuses it: its last words."""
    env = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "PYTHONPATH": "",
    }
    command = [python, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return (lines or done.stderr.splitlines())[-1].strip()
    return json.loads(done.stdout.splitlines()[-1])


def answer(job: dict[str, Any]) -> list[list[int]]:
    """In the environment of vLLM."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    count = job["new_tokens"]
    # Not min_tokens, which would forbid the end token.
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    out = engine.generate(prompts, sampling, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in out]


def measure(family: str, method: str, folder: Path, python: str) -> dict[str, Any]:
    """Export one model, and compare its tokens in vLLM with those here."""
    import jax
    import numpy as np

    import zflora_jax as zf
    from zflora_jax.core.presets import preset
    from zflora_jax.nn.llama import random_model

    nope = (1,) if family == "smollm3" else ()
    window = 16 if family == "mistral" else None
    config = preset("tiny").replace(
        family=family,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=512,
        nope_layers=nope,
        sliding_window=window,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = random_model(config, jax.random.key(0))
    # Large enough that attention is far from uniform and the likeliest token is a clear one.
    model.params = jax.tree.map(lambda x: 3.0 * x if x.ndim > 2 else x, model.params)
    adapter = zf.AdapterConfig(method, rank=16, extra_mlp_units=16)
    leaves, tree = jax.tree.flatten(zf.init_adapters(jax.random.key(1), model, adapter))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    model = zf.fuse(model, adapter, tree.unflatten(moved))
    zf.save_hf(str(folder), model)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(4, 512, 20 + 3 * i).tolist() for i in range(PROMPTS)]
    from zflora_jax.inference.decode import generate_tokens

    ours = generate_tokens(
        zf.load_model(str(folder)), prompts, max_new_tokens=NEW_TOKENS, stop_token_ids=()
    )
    stock = in_transformers(str(folder), prompts)
    job = {"model": str(folder), "prompts": prompts, "new_tokens": NEW_TOKENS}
    theirs = in_vllm(python, job)
    row: dict[str, Any] = {"family": family, "method": method, "head_dim": model.config.head_dim}
    row |= {"stock": same(ours, stock), "distinct": len({t for answer in ours for t in answer})}
    return row | ({"refused": theirs} if isinstance(theirs, str) else {"same": same(ours, theirs)})


def same(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many tokens are equal, as a text."""
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)}"


def in_transformers(path: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of a model directory, by its stock class."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # which min_new_tokens would forbid
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    found = [model.generate(torch.tensor([p]), pad_token_id=0, **options)[0] for p in prompts]
    return [tokens[len(p) :].tolist() for tokens, p in zip(found, prompts, strict=True)]


def page(result: dict[str, Any]) -> str:
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    rows = [
        {
            "family": row["family"],
            "export of": row["method"],
            "head_dim": row["head_dim"],
            "transformers: same tokens": row["stock"],
            "vLLM: same tokens": row.get("same") or f"refused: {row['refused']}",
            "different tokens among them": row["distinct"],
        }
        for row in result["rows"]
    ]
    return f"""# Exports of every family in vLLM

Small models with random weights, {result["vllm"]}, float32, {NEW_TOKENS} greedy tokens of
{PROMPTS} prompts, against this project's decode of the same directory.

{markdown_table(rows, list(rows[0]))}

{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", metavar="PYTHON")
    parser.add_argument("--out", default="results/vllm_families")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(answer(json.loads(args.job))))
        return
    if not args.vllm_python:
        parser.error("give --vllm-python, the python of an environment with vLLM")
    from zflora_jax.core.families import FAMILIES
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    found = subprocess.run([args.vllm_python, "-c", code], capture_output=True, text=True)
    result: dict[str, Any] = {
        "vllm": f"vllm-cpu {found.stdout.strip()}",
        "rows": [],
        "environment": environment(),
    }
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            for method in METHODS:
                to = Path(folder) / f"{family}-{method}"
                result["rows"].append(measure(family, method, to, args.vllm_python))
                print(result["rows"][-1], flush=True)
    write_result(args.out, result, page(result))


if __name__ == "__main__":
    main()
