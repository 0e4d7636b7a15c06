"""The headlines of what the compilers of absent TPUs and GPUs say, from the tables beside it.

Command: python benchmarks/accelerators.py
Reads results/compile*.json (`zflora bench compile`) and results/train_targets.json
(`python benchmarks/train_targets.py`); writes results/accelerators.json and .md. Seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zflora_jax.bench.contenders import BASE, UNMERGED
from zflora_jax.reporting.files import write_result
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table

RESULTS = Path(__file__).resolve().parent.parent / "results"
GIB = 2**30


def decode_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each target, model and batch: the base beside the worst of the fused models."""
    found = []
    for case in dict.fromkeys((r["target"], r["model"], r["layers"], r["batch"]) for r in rows):
        own = [r for r in rows if (r["target"], r["model"], r["layers"], r["batch"]) == case]
        base = next(r for r in own if r["label"] == BASE)
        lora = next(r for r in own if r["label"] == UNMERGED)
        fused = [r for r in own if r["label"] not in (BASE, UNMERGED)]
        least, most = (f(r["kernels"] for r in fused) for f in (min, max))
        more = max(r["temporaries"] for r in fused) - base["temporaries"]

        def of_floor(key: str, some: list[dict[str, Any]]) -> float | None:
            return max(r.get(key) or 0.0 for r in some) or None

        found.append(
            dict(zip(("target", "model", "layers", "batch"), case, strict=True))
            | {
                "base kernels": base["kernels"],
                "fused": f"{least} to {most}" if least < most else str(most),
                "LoRA un-merged": lora["kernels"],
                "programs": len(fused),
                "copies": sum(r["copies"] for r in fused),
                "temporaries above base, MiB": round(more / 2**20, 1),
                "base of floor": of_floor("floor_share", [base]),
                "fused of floor": of_floor("floor_share", fused),
                "prefill: base of floor": of_floor("prefill_share", [base]),
                "prefill: fused of floor": of_floor("prefill_share", fused),
            }
        )
    return found


def train_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What fits, and how near the formula is, for each program that was compiled."""
    return [
        {
            **{key: row[key] for key in ("target", "model", "method", "remat")},
            "total, GiB": round(row["bytes"]["total"] / GIB, 2),
            "formula / compiler": round(row["formula"] / row["bytes"]["total"], 2),
            "rows that fit": row["rows_that_fit"],
            "compiled with": row.get("largest", {}).get("rows", "-"),
            "at least, ms": round(1e3 * row["roofline"]["step_s"]),
            "bound by": row["roofline"]["bound"],
        }
        for row in rows
        if "bytes" in row
    ]


def page(result: dict[str, Any]) -> str:
    decode = [
        row | {k: "-" if row[k] is None else f"{row[k]:.2f}" for k in row if "of floor" in k}
        for row in result["decode"]
    ]
    lines = [
        "# What the compilers of absent TPUs and GPUs say",
        "",
        "**Compiled for, not run.** libtpu and XLA's CUDA plugin compile programs for devices that"
        " are not there; nothing of this was timed. Details: " + ", ".join(result["sources"]) + ".",
        "",
        "## A token of decode",
        "",
        "Kernels in the token loop: of the base, of fused models (ffba, zflora-minimal,"
        " zflora-uniform at every rank that was compiled), and of LoRA beside the base. copies:"
        " kernels, tables or caches that a fused token writes anew. temporaries: the most of any"
        " fused model. of floor: the TPU compiler's cycles and the bytes that it copies ahead, over"
        " the time to read weights and cache; of prefill, over the time to read or multiply the"
        " layers and to read the head. The most of any fused model.",
        "",
        markdown_table(decode, list(decode[0])) if decode else "Not compiled yet.",
        "",
        "## A train step",
        "",
        "One row of 2048 tokens a device, bfloat16, rank 32, the base divided by fsdp. formula:"
        " `zflora plan`'s own. rows that fit: an estimate; compiled with: rows that the compiler"
        " was seen to fit. at least: a roofline.",
        "",
        markdown_table(result["train"], list(result["train"][0]))
        if result["train"]
        else "Not compiled yet.",
        "",
        origin_line(result["environment"]),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    decode, train = (
        sorted(RESULTS.glob("compile*.json")),
        sorted(RESULTS.glob("train_targets*.json")),
    )

    def rows(files: list[Path]) -> list[dict[str, Any]]:
        return [
            row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]
        ]

    result = {
        "decode": decode_rows(rows(decode)),
        "train": train_rows(rows(train)),
        "sources": [f"[{f.stem}]({f.stem}.md)" for f in (*decode, *train)],
        "environment": environment(),
    }
    write_result(RESULTS / "accelerators", result, page(result))


if __name__ == "__main__":
    main()
