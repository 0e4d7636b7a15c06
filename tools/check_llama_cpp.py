"""Checks that llama.cpp computes from GGUF files what this project computes from the same weights.

Command: python tools/check_llama_cpp.py --python ENV/bin/python FILE.gguf ...
(ENV: an environment with `pip install xllamacpp numpy`). For each file: greedy tokens after three
prompts, and the perplexity of a text in pieces of 512 tokens, by llama.cpp and by this project's
loader and forward pass in float32. llama.cpp rounds activations to 8 bits where the weights are
quantised, so the two differ there.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from check_consumers import PROMPTS, ask, scores
from consumer_workers import NEW_TOKENS

CHUNK = 512


def check(file: Path, python: str, text: str) -> dict[str, Any]:
    """Runs a file in both; returns a row of the table."""
    from zflora_jax import generate_tokens, load_model

    model = load_model(file)
    ids, whole = ([model.tokenizer(one)["input_ids"] for one in part] for part in (PROMPTS, [text]))
    chunks = [whole[0][i : i + CHUNK] for i in range(0, len(whole[0]) - CHUNK + 1, CHUNK)]
    found = ask(python, "llama.cpp", {"gguf": str(file), "ids": ids, "chunks": chunks})
    row: dict[str, Any] = {"file": file.name, "MB": file.stat().st_size / 1e6}
    if "error" in found:
        return row | {"llama.cpp": found["error"]}
    tokens = generate_tokens(model, ids, max_new_tokens=NEW_TOKENS, stop_token_ids=())
    same = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != int(b)), NEW_TOKENS)
        for x, y in zip(found["tokens"], tokens, strict=True)
    ]
    mean = np.mean(np.concatenate(scores(model, chunks)["logp"]))
    ours, theirs = math.exp(-mean), math.exp(found["nll"])
    return row | {
        f"same greedy tokens of {NEW_TOKENS}": ", ".join(map(str, same)),
        "perplexity, llama.cpp": theirs,
        "this project": ours,
        "ratio": theirs / ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.gguf")
    parser.add_argument("--python", required=True, metavar="FILE", help="one that has xllamacpp")
    args = parser.parse_args()
    from zflora_jax.reporting.tables import markdown_table

    docs = sorted(Path(__file__).resolve().parent.parent.glob("docs/*.md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in docs)[:20_000]
    rows = [check(file, args.python, text) for file in args.files]
    print(markdown_table(rows, list(dict.fromkeys(key for row in rows for key in row))))


if __name__ == "__main__":
    main()
