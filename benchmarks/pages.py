"""Write the pages of results/ again from their JSON files, without measuring anything: after a
change of the words or the layout.

Command: python benchmarks/pages.py [NAME ...]     (without names: every page)
With --check nothing is written: it fails if a page is not what its JSON file gives.
Each benchmark has a function `page` from the content of its JSON file to the text of its page; the
table below says which one makes which page. Left out are the pages of sweeps (accuracy*,
letter_form, minimal*, gsm8k_budget, quantised_gsm8k), which `zflora sweep` writes from the
records of runs, and those that only their own commands write: compressed, consumers, export_int8,
faults, quickstart.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zflora_jax.reporting.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def script(name: str) -> Callable[[dict[str, Any]], str]:
    """`page` of a script in this folder, imported when it is used: some need torch."""
    return lambda result: importlib.import_module(name).page(result)


def tool(name: str) -> Callable[[dict[str, Any]], str]:
    """`script`, of one in tools/."""

    def page(result: dict[str, Any]) -> str:
        sys.path.append(str(ROOT / "tools"))
        return script(name)(result)

    return page


def latency(result: dict[str, Any]) -> str:
    from zflora_jax.bench.latency import page

    pictures = [f"latency-{kind}.png" for kind in ("ratio", "rank")]
    settings = result["settings"]
    title = f"Decode latency: {settings['model']}, {settings['dtype']}"
    return page(result, title, [name for name in pictures if (RESULTS / name).is_file()])


def train(result: dict[str, Any]) -> str:
    from zflora_jax.bench.case import Case
    from zflora_jax.bench.training import page

    rows = [row | {"case": Case(**row["case"])} for row in result["rows"]]
    case = rows[0]["case"]
    return page(result | {"rows": rows}, f"A training step: {case.model}, {case.dtype}")


def compiled(name: str) -> Callable[[dict[str, Any]], str]:
    """The page of `zflora bench compile --out results/<name>`."""

    def page(result: dict[str, Any]) -> str:
        from zflora_jax.bench.compiled import page

        return page(result, [f"{name}-kernels.png"])

    return page


PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "accelerators": script("accelerators"),
    "attention": script("attention"),
    "compile_1b": compiled("compile_1b"),
    "compile_3b": compiled("compile_3b"),
    "compile_7b": compiled("compile_7b"),
    "cost_quality": script("cost_quality"),
    "decode_variants": script("decode_variants"),
    "generation_check": script("generation_check"),
    "latency": latency,
    "likelihood_speed": script("likelihood_speed"),
    "on_device": script("on_device"),
    "paired_intervals": script("paired_intervals"),
    "paper_plan": script("paper"),
    "litert": tool("check_litert"),
    "lm_eval": tool("check_lm_eval"),
    "plan": script("plan"),
    "quantised": script("quantised"),
    "scaling": script("scaling"),
    "speed": script("speed"),
    "startup": script("startup"),
    "step_profile": script("step_profile"),
    "target_variants": script("target_variants"),
    "task_switch": script("task_switch"),
    "train": train,
    "train_bfloat16": train,
    "train_quantised": train,
    "train_targets": script("train_targets"),
    "train_targets_h100": script("train_targets"),
    "train_targets_v5p": script("train_targets"),
    "train_targets_v6e": script("train_targets"),
    "transformers_versions": script("check_transformers_4"),
    "two_processes": script("two_processes"),
    "vllm_families": script("vllm_families"),
    "vllm_latency": script("vllm_latency"),
    "vllm_latency_1b": script("vllm_latency"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PAGES)}")
    parser.add_argument("--check", action="store_true", help="compare the pages, write nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in PAGES]:
        parser.error(f"no page {', '.join(unknown)}: choose from {', '.join(PAGES)}")
    differ = []
    for name in args.names or PAGES:
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        text = PAGES[name](result)
        folder = ROOT / "docs" if name == "scaling" else RESULTS  # a page of the documentation
        page = folder / f"{name}.md"
        if not args.check:
            atomic_write(page, text.encode())
        elif page.read_text(encoding="utf-8") != text:
            differ.append(f"{folder.name}/{page.name}")
    if differ:
        raise SystemExit(
            f"not what their JSON files give: {', '.join(differ)}. Run python benchmarks/pages.py."
        )


if __name__ == "__main__":
    main()
