"""`python tools/tiny_model.py OUT [FAMILY]` writes a tiny model directory, with random weights and
a byte tokenizer, to try a change on: the model that the tests train. FAMILY: llama (default),
mistral, qwen2, qwen3, smollm3.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"


def main(out: str, family: str = "llama") -> None:
    sys.path.insert(0, str(TESTS))
    from support.byte_tokenizer import byte_tokenizer
    from support.runs import saved_base

    from zflora_jax.core.families import FAMILIES

    if family not in FAMILIES:
        sys.exit(f"no family {family!r}; choose from {', '.join(FAMILIES)}.")
    print("written:", saved_base(Path(out), byte_tokenizer(), family))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python tools/tiny_model.py OUT [FAMILY]")
    main(*sys.argv[1:])
