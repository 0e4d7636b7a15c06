"""Writes a tiny model with random weights and a byte tokenizer, as the tests train it."""

import argparse
import sys
from pathlib import Path

from zflora_jax.core.families import FAMILIES

TESTS = Path(__file__).parent.parent / "tests"


def main(out: str, family: str = "llama") -> None:
    sys.path.insert(0, str(TESTS))
    from support.byte_tokenizer import byte_tokenizer
    from support.runs import saved_base

    print("written:", saved_base(Path(out), byte_tokenizer(), family))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("family", nargs="?", default="llama", choices=FAMILIES)
    main(**vars(parser.parse_args()))
