"""starts.jsonl: one line for every start of a run, because a resumed run may go on with other code,
software or devices.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from zflora_jax.core.textfile import lines_of
from zflora_jax.reporting.files import atomic_write, plain

STARTS_FILE = "starts.jsonl"


def record_start(workdir: str | Path, step: int, env: Mapping[str, Any], **more: Any) -> None:
    """Append a line to <workdir>/starts.jsonl.

    Args:
      step: the finished steps that the start goes on from.
      env: of `report.environment`.
      more: what else the line holds; entries that are empty are left out.
    """
    path = Path(workdir) / STARTS_FILE
    earlier = path.read_bytes() if path.is_file() else b""
    line = {"step": step} | dict(env) | {name: value for name, value in more.items() if value}
    atomic_write(path, earlier + json.dumps(plain(line)).encode() + b"\n")


def read_starts(workdir: str | Path) -> list[dict[str, Any]]:
    """The starts of a run, the first one first; none where the file is not there. Damaged lines are
    left out.
    """
    path, found = Path(workdir) / STARTS_FILE, list[dict[str, Any]]()
    if not path.is_file():
        return found
    for line in lines_of(path.read_text(encoding="utf-8", errors="replace")):
        with contextlib.suppress(ValueError):
            start = json.loads(line)
            found += [start] if isinstance(start, dict) else []
    return found


def first_day(workdir: str | Path) -> str | None:
    """The local date of the first start ("2026-11-26"), None where it is not known."""
    with contextlib.suppress(IndexError, KeyError, TypeError, ValueError):
        # Recorded in UTC; transformers tells a chat template the local date.
        return (
            datetime.fromisoformat(read_starts(workdir)[0]["date"]).astimezone().date().isoformat()
        )
    return None
