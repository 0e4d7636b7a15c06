"""Result page of a finished quickstart: its figures, its loss curve, three of its answers.

Command: python benchmarks/quickstart.py runs/quickstart     (after `make quickstart`)
Writes results/quickstart.json, quickstart.md and loss.png.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import arguments

from zflora_jax.reporting.files import atomic_write, write_result
from zflora_jax.reporting.provenance import origin_line


def page(result: Mapping[str, Any]) -> str:
    """Returns the page of a quickstart's record."""
    r = result
    lines = [
        "# Quickstart\n",
        "|  | base | tuned and fused |",
        "|---|---|---|",
        f"| accuracy | {r['accuracy_before']:.3f} | {r['accuracy_after']:.3f} |",
        f"| held-out loss | {r['loss_before']:.4f} | {r['loss_after']:.4f} |",
        f"| TPOT (ms) | {r['tpot_ms_base']:.1f} | {r['tpot_ms_fused']:.1f} |\n",
        f"{r['method']}, {r['params_trainable']:,} trainable parameters beside"
        f" {r['params_base']:,}; {r['accuracy_rows']} held-out problems.\n",
        "- Fused against adapted, largest difference of the logits:"
        f" {r['fused_max_abs_dlogit']:.3g} at a scale of {r['logit_scale']:.3g}. Exported directory"
        f" against the fused model: {r['export_max_abs_dlogit']:.3g}, the same likeliest token"
        f" at {100 * r['export_top1_agreement']:.4g}% of positions.",
        f"- Another adapter in the live model: {r['switch_ms']:.3g} ms. The base after that, taken"
        f" out: {'equal, bit for bit' if r['base_bit_for_bit'] else 'NOT equal'}.",
        "- The same adapter beside the blocks of the base's own 4-bit file: accuracy"
        f" {r['accuracy_on_blocks']:.3f}.\n",
        "![loss](loss.png)\n",
    ]
    for sample in r["samples"]:
        named = {name: " ".join(text.split()) for name, text in sample.items()}
        lines += ["```text", *(f"{name}: {text}" for name, text in named.items()), "```\n"]
    origin = origin_line(r["environment"])
    return "\n".join(
        [*lines, f"{origin} Seed {r['config']['train']['seed']}; {r['seconds']:.0f} s.\n"]
    )


def main() -> None:
    parser = arguments(__doc__, "quickstart")
    parser.add_argument("workdir", type=Path, help="directory of the run")
    args = parser.parse_args()
    if not (record := args.workdir / "quickstart.json").is_file():
        parser.error(f"{record} does not exist: run `make quickstart` first, or give its --workdir")
    result = json.loads(record.read_text(encoding="utf-8"))
    if "accuracy_on_blocks" not in result:
        parser.error(
            f"{record} has no accuracy_on_blocks: the page is of a widening method on a .gguf"
        )
    atomic_write(args.out.with_name("loss.png"), (args.workdir / "curves.png").read_bytes())
    write_result(args.out, result, page(result))


if __name__ == "__main__":
    main()
