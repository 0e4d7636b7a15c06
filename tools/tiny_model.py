"""Writes a tiny model directory, with random weights and a byte tokenizer, to try a change on: the
model that the tests train.
"""

import argparse
import sys
from pathlib import Path

from zflora_jax.core.families import FAMILIES

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.byte_tokenizer import byte_tokenizer
from support.runs import saved_base

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("family", nargs="?", default="llama", choices=FAMILIES)
    args = parser.parse_args()
    print("written:", saved_base(args.out, byte_tokenizer(), args.family))
