"""Runs commands one after the other in this process, one of several that ZFLORA_COORDINATOR and
its sisters name.

Arguments: a JSON list of commands, each a list of words; a folder whose read-<process>.json gets
how much of each tensor of model directories was read (a list: for each command tensor -> share).
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from zflora_jax.cli.main import main
from zflora_jax.hf.shards import Shards
from zflora_jax.parallel import distributed


def run(commands: list[list[str]], folder: Path) -> int:
    """Run `commands` until one fails; returns its exit code."""
    read: dict[str, float] = defaultdict(float)
    original = Shards.read

    def counted(self: Shards, name: str, *slices: object) -> np.ndarray:
        value = original(self, name, *slices)
        if name in self.shapes:  # not the codes and scales that a tensor is stored as
            read[name] += value.size / np.prod(self.shapes[name])
        return value

    distributed.PIECE = 1000  # bytes; what the processes exchange is more
    Shards.read = counted  # type: ignore[assignment,method-assign]
    found = []
    for argv in commands:
        read.clear()
        print(f"--- {argv[0]}", flush=True)
        if code := main(argv):
            return code
        found.append(dict(read))
        number = os.environ.get("ZFLORA_PROCESS_ID", "0")
        (folder / f"read-{number}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1]), Path(sys.argv[2])))
