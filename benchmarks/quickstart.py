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
        "**{:.0f} seconds take accuracy from {:.2f} to {:.2f}.** ![loss](loss.png)\n".format(
            *(r[key] for key in ("seconds", "accuracy_before", "accuracy_after"))
        ),
        "|  | base | trained and fused |",
        "|---|---:|---:|",
        f"| accuracy | {r['accuracy_before']:.3f} | {r['accuracy_after']:.3f} |",
        f"| held-out loss, nats | {r['loss_before']:.4f} | {r['loss_after']:.4f} |",
        f"| TPOT, ms | {r['tpot_ms_base']:.1f} | {r['tpot_ms_fused']:.1f} |\n",
        f"{r['method']}, {r['params_trainable']:,} trainable parameters on a base of"
        f" {r['params_base']:,}; {r['accuracy_rows']} held-out problems.\n",
        "- Largest logit difference between fused and unmerged model:"
        f" {r['fused_max_abs_dlogit']:.3g} at a logit scale of {r['logit_scale']:.3g}; between"
        f" exported and fused model: {r['export_max_abs_dlogit']:.3g}, with the same likeliest"
        f" token at {100 * r['export_top1_agreement']:.4g}% of positions.",
        f"- Switching the live model to another adapter: {r['switch_ms']:.3g} ms. After it, the"
        f" unfused base is {'equal, bit for bit' if r['base_bit_for_bit'] else 'NOT equal'}.",
        "- Accuracy of the same adapter on the base's 4-bit blocks:"
        f" {r['accuracy_on_blocks']:.3f}.\n",
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
