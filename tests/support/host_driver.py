"""Runs commands one after the other in this process, one of several that ZFLORA_COORDINATOR and
its sisters name. Argument: a JSON list of commands, each a list of words.
"""

from __future__ import annotations

import json
import sys

from zflora_jax.cli.main import main


def run(commands: list[list[str]]) -> int:
    """Run `commands` until one fails; returns its exit code."""
    for argv in commands:
        print(f"--- {argv[0]}", flush=True)
        if code := main(argv):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1])))
