"""The full sweep of faults: `make soak` writes results/faults.json and .md. About 40 minutes on two
free CPU cores.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from support.byte_tokenizer import byte_tokenizer
from support.faults import FAULTS, tries
from support.lab import Lab, Outcome, lab_run
from support.runs import saved_base, small_run

from zflora_jax.reporting.files import atomic_write, write_json
from zflora_jax.reporting.provenance import environment, origin_line
from zflora_jax.reporting.tables import markdown_table


def attacked_files() -> dict[str, Any]:
    """The unit tests that damage and attack model files, configs and adapter directories, counted
    as one fault.
    """
    files = (
        "hf/test_fuzz.py",
        "hf/test_hf_load.py",
        "hf/test_hf_gguf.py",
        "hf/test_packaged_model.py",
        "hf/test_sharded_load.py",
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "1",
        *(str(Path(__file__).parent / name) for name in files),
    ]
    last = subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    counted = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", last)
    }
    survived, tried = counted.get("passed", 0), sum(counted.values())
    return {
        "fault": "model files, configs and adapters cut, damaged and attacked",
        "tries": tried,
        "survived": survived,
        "lost steps": 0,
        "message": last,
    }


def without_folders(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, temporary folders left out of their messages."""
    found: list[dict[str, Any]] = json.loads(
        re.sub(rf"{re.escape(tempfile.gettempdir())}/tmp\w+/", "", json.dumps(rows))
    )
    return found


def outcome_of(attempt: Callable[[], Outcome]) -> Outcome:
    """Of one try. Whatever it raises, the others go on, and this one has failed."""
    try:
        return attempt()
    except Exception:
        return Outcome(False, 0, traceback.format_exc()[-1000:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="results", help="where faults.json and faults.md go")
    parser.add_argument("--tries", type=int, help="of every fault (default: 1 to 50, by fault)")
    parser.add_argument(
        "--only",
        choices=FAULTS,
        help="one fault; the rows of the others, if there are any, stay as they are",
    )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # as the processes that it starts
    env, failed, file = environment(), 0, Path(args.out) / "faults.json"
    rows: list[dict[str, Any]] = []
    if args.only and file.is_file():
        before = json.loads(file.read_text())
        rows = [{"commit": before["environment"]["commit"][:9]} | row for row in before["faults"]]

    def record(row: dict[str, Any]) -> None:
        """Replace the fault's row, or add it."""
        row = row | {"commit": env["commit"][:9], "date": env["date"]}
        rows[:] = [row if old["fault"] == row["fault"] else old for old in rows] + [row] * all(
            old["fault"] != row["fault"] for old in rows
        )
        rows[:] = without_folders(rows)
        write_json(file, {"faults": rows, "environment": env})

    with tempfile.TemporaryDirectory() as folder:
        base = saved_base(Path(folder) / "model", byte_tokenizer())
        lab = Lab(lab_run(small_run(base)), Path(folder) / "lab")
        for name, (attempt, count) in FAULTS.items():
            if args.only not in (None, name):
                continue
            attempts = tries(lab, name, attempt, args.tries or count, Path(folder) / "tries")
            outcomes = [outcome_of(one) for one in attempts]
            bad = [outcome.message for outcome in outcomes if not outcome.survived]
            failed += len(bad)
            survived = sum(outcome.survived for outcome in outcomes)
            row = {
                "fault": name,
                "tries": len(outcomes),
                "survived": survived,
                "lost steps": max(outcome.lost_steps for outcome in outcomes),
            }
            record(
                row
                | {
                    "message": outcomes[-1].message,
                    "messages": [outcome.message for outcome in outcomes],
                    "failures": bad,
                }
            )
            print(row, *bad, sep="\n", flush=True)
    if args.only is None:
        attacked = attacked_files()
        failed += attacked["tries"] - attacked["survived"]
        record(attacked)
    columns = ["fault", "tries", "survived", "lost steps", "message", "commit"]
    shown = [{key: row[key] for key in columns} for row in rows]
    text = (
        "# Faults\n\nWhat a training run must survive (tests/support/faults.py): the run that goes"
        " on ends bit-equal to an uninterrupted one.\n\n"
    )
    text += markdown_table(shown, columns) + f"\n\n{origin_line(env)}\n"
    atomic_write(f"{args.out}/faults.md", text.encode())
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
