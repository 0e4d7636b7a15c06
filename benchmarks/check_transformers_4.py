"""Exports under two releases of transformers: do 5 and 4.57 compute the same from one directory,
and both what the model in memory computes?

Exports SmolLM2-135M (the packaged copy) as it is and fused by each of the six methods with
perturbed adapters, loads every directory with stock transformers in both releases (this
environment's, and the one of --python), and compares logits and greedy tokens, also with this
project's own forward. Writes transformers_versions.json and .md to --out. Run once per release of
either; it takes some minutes and 0.6 GB of temporary disk.

    python -m venv /tmp/transformers-4
    /tmp/transformers-4/bin/pip install "transformers==4.57.1" torch numpy
    python benchmarks/check_transformers_4.py --python /tmp/transformers-4/bin/python

Both interpreters run this file with --measure, which imports numpy, torch and transformers alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = [
    "The three states of matter are",
    "Q: A farmer has 12 cows and buys 30 more. How many cows are there now?\nA:",
    "Once upon a time, in a village by the sea, there lived",
]
NEW_TOKENS = 64
LIMIT = 1e-5  # float32: max |dlogit| <= LIMIT x max |logit| (CONTRIBUTING.md)


def measure(directory: Path, prompts_file: Path, out: Path) -> None:
    """Logits of each prompt alone, greedy tokens of all as one left-padded batch; to an
    .npz file.
    """
    import torch
    import transformers

    # One order of summation in both releases; and threads that wait for each other are slow beside
    # other work.
    torch.set_num_threads(1)
    prompts = json.loads(prompts_file.read_text(encoding="utf-8"))
    loader = transformers.AutoModelForCausalLM.from_pretrained
    dtype = (
        {"dtype": torch.float32}
        if int(transformers.__version__.split(".")[0]) >= 5
        else {"torch_dtype": torch.float32}
    )
    model = loader(directory, **dtype).eval()
    model.generation_config.eos_token_id = None  # compare all NEW_TOKENS tokens
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        logits = np.concatenate([model(torch.tensor([p])).logits[0].numpy() for p in prompts])
        tokens = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )[:, width:].numpy()
    np.savez(
        out,
        logits=logits,
        tokens=tokens,
        transformers=transformers.__version__,
        torch=torch.__version__,
    )


def run(python: str, directory: Path, prompts_file: Path, out: Path) -> dict[str, np.ndarray]:
    """`measure` in a process of the interpreter `python`."""
    command = [python, __file__, "--measure", str(directory), str(prompts_file), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} could not measure {directory.name}:\n{done.stderr[-3000:]}")
    with np.load(out) as values:
        return dict(values)


def fused(base: Any, method: str, rank: int, std: float) -> Any:
    """`base`, or `base` with adapters that have moved away from the start by normal noise of
    `std`.
    """
    import jax
    import jax.numpy as jnp

    from zflora_jax import AdapterConfig, fuse, init_adapters
    from zflora_jax.core import trees

    if method == "base":
        return base
    adapter, rng = AdapterConfig(method, rank=rank), np.random.default_rng(0)
    adapters = init_adapters(jax.random.key(0), base, adapter)
    # Full has no low rank: the same noise on every weight would drown the model.
    spread = std if method != "full" else 0.1 * std
    moved = trees.map_with_names(
        lambda _, x: x + jnp.asarray(spread * rng.standard_normal(x.shape), x.dtype), adapters
    )
    return fuse(base, adapter, moved)


def compare(
    model: Any,
    prompts: list[list[int]],
    five: dict[str, np.ndarray],
    four: dict[str, np.ndarray],
    base_logits: np.ndarray | None,
) -> Any:
    """One row of the table, and our own logits."""
    from zflora_jax import forward, generate_tokens

    ours = np.concatenate(
        [np.asarray(forward(model, np.asarray([p], np.int32)))[0] for p in prompts]
    )
    tokens = np.asarray(
        generate_tokens(model, prompts, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    )
    scale = float(np.abs(ours).max())

    def gap(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a.astype(np.float64) - b).max())

    row = {
        "logit_scale": scale,
        "dlogit_to_base": None if base_logits is None else gap(ours, base_logits),
        "dlogit_5_4": gap(five["logits"], four["logits"]),
        "dlogit_5_ours": gap(five["logits"], ours),
        "dlogit_4_ours": gap(four["logits"], ours),
        "tokens_5_4_equal": bool((five["tokens"] == four["tokens"]).all()),
        "tokens_5_ours_equal": bool((five["tokens"] == tokens).all()),
        "distinct_tokens": len(np.unique(tokens)),
    }
    return (
        row
        | {
            "within_tolerance": all(
                row[name] <= LIMIT * scale
                for name in ("dlogit_5_4", "dlogit_5_ours", "dlogit_4_ours")
            )
        },
        ours,
    )


COLUMNS = {
    "model": "model",
    "logit_scale": "max abs logit",
    "dlogit_to_base": "max abs dlogit to base",
    "dlogit_5_4": "5 against 4.57",
    "dlogit_5_ours": "5 against ours",
    "dlogit_4_ours": "4.57 against ours",
    "within_tolerance": "within 1e-5 x max abs logit",
    "tokens_5_4_equal": "greedy tokens 5 = 4.57",
    "tokens_5_ours_equal": "greedy tokens 5 = ours",
    "distinct_tokens": "distinct tokens",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", required=True, help="an interpreter that has transformers 4.57.1 and torch"
    )
    parser.add_argument(
        "--rank",
        type=int,
        default=16,
        help="rank of the adapters; their other widths are the defaults (default: 16)",
    )
    parser.add_argument(
        "--std",
        type=float,
        default=0.01,
        help="noise added to every adapter leaf (default: 0.01; a tenth of it for full)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        help="directory of the results (default: results)",
    )
    return parser.parse_args()


def measure_all(python: str, rank: int, std: float) -> dict[str, Any]:
    """The rows of the table: the base and every method, under both releases."""
    from zflora_jax import load_model, save_hf
    from zflora_jax.core.adapter_config import METHODS
    from zflora_jax.reporting.provenance import environment
    from zflora_jax.reporting.tables import markdown_table

    # now: the code that this process has loaded, whatever is committed while it runs.
    origin = environment()
    base = load_model("smollm2-135m")
    prompts = [base.tokenizer(text)["input_ids"] for text in PROMPTS]
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    base_logits = None
    for method in ["base", *METHODS]:
        with tempfile.TemporaryDirectory() as folder:
            prompts_file, directory = Path(folder, "prompts.json"), Path(folder, "export")
            prompts_file.write_text(json.dumps(prompts), encoding="utf-8")
            model = fused(base, method, rank, std)
            save_hf(directory, model)
            five, four = (
                run(p, directory, prompts_file, Path(folder, "out.npz"))
                for p in (sys.executable, python)
            )
        row, ours = compare(model, prompts, five, four, base_logits)
        base_logits = ours if method == "base" else base_logits
        versions = {
            f"{name} {key}": str(values[name])
            for name in ("transformers", "torch")
            for key, values in (("5", five), ("4", four))
        }
        rows.append({"model": method} | row)
        print(markdown_table(rows[-1:], COLUMNS).splitlines()[-1], flush=True)
    return {
        "rows": rows,
        "versions": versions,
        "rank": rank,
        "std": std,
        "seeds": {"init": 0, "noise": 0},
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "environment": origin,
    }


def page(result: dict[str, Any]) -> str:
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    env, seen = result["environment"], result["versions"]
    return f"""# Exports under transformers 5 and 4.57

SmolLM2-135M, float32, adapters of rank {result["rank"]} and default widths, every adapter leaf
perturbed by noise of std {result["std"]} (full: a tenth of it; seed 0). transformers
{seen["transformers 5"]} (torch {seen["torch 5"]}) and {seen["transformers 4"]} (torch
{seen["torch 4"]}) load the same directories. {len(result["prompts"])} prompts: the logits of each
alone, and {result["new_tokens"]} greedy tokens of all as one left-padded batch. Differences are
max |dlogit|.

{markdown_table(result["rows"], COLUMNS)}

{origin_line(env)} Python {env["python"]}.
"""


def main() -> None:
    from zflora_jax.reporting.files import write_result

    args = parse_args()
    result = measure_all(args.python, args.rank, args.std)
    write_result(args.out / "transformers_versions", result, page(result))
    print(page(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*map(Path, sys.argv[2:5]))
    else:
        main()
