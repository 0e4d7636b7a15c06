"""Writes the pages of results/ from their JSON files again, without measuring.

Command: python benchmarks/pages.py [NAME ...]     (without names: every page)
With --check nothing is written: it fails if a page is not what its JSON file gives. Each module
below has a function `page` from the content of the JSON file to the text of the page.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from harness import RESULTS, ROOT

from zflora_jax.reporting.files import atomic_write

# Result -> module in benchmarks/ or tools/
PAGES = {"consumers": "check_consumers", "lm_eval": "check_lm_eval", "train": "training"}
PAGES |= {x: x for x in "accelerators latency quantised quickstart serving task_switch".split()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PAGES)}")
    parser.add_argument("--check", action="store_true", help="compare the pages, write nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in PAGES]:
        parser.error(f"no page {', '.join(unknown)}: choose from {', '.join(PAGES)}")
    sys.path.append(str(ROOT / "tools"))
    differ = []
    for name in args.names or PAGES:
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        text, page = importlib.import_module(PAGES[name]).page(result), RESULTS / f"{name}.md"
        if not args.check:
            atomic_write(page, text.encode())
        elif page.read_text(encoding="utf-8") != text:
            differ.append(page.name)
    if differ:
        raise SystemExit(
            f"not what their JSON files give: {', '.join(differ)}. Run python benchmarks/pages.py."
        )


if __name__ == "__main__":
    main()
