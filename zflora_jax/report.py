"""Result files: where a number came from, JSON written whole or not at all, Markdown tables.

Nothing written here holds an absolute path or a host name, so that results can be published as they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zflora_jax.fields import require

_SCHEME = re.compile(r"[A-Za-z][\w+.-]+:/")  # gs://bucket/run, and gs:/bucket/run, which a Path makes of it; not a drive letter
# What decides a result. Other files (notes, results being written right now) do not make a commit "dirty".
_CODE = ("zflora_jax", "configs", "benchmarks", "train.py", "eval.py", "pyproject.toml", "constraints.txt")
_ABSOLUTE = re.compile(r"(?<![\w./:~-])/[^\s,=:'\"]+")  # not the slashes of a/b, ./a, ~/a or a URL


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """`path` as a Path, for what is going to be written there; called before anything is created.

    Args:
      path: of a local file or directory.
      name: what the message calls it, e.g. "workdir".

    Raises:
      ConfigError: a URL. As a Path it would become a directory called "gs:" here.
    """
    scheme = _SCHEME.match(os.fspath(path))
    require(
        scheme is None,
        f"{name} {os.fspath(path)} is a URL: object storage is not supported yet. Give a directory of a file system that is mounted here, "
        "and copy it afterwards.",
    )
    return Path(path)


def environment() -> dict[str, Any]:
    """The command, code, software and device behind a result, JSON-ready. Imports jax and starts its backend."""
    import jax

    commit, dirty = _git_state(Path(__file__).resolve().parent.parent)
    devices = jax.devices()
    return {
        "command": command_line(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "cpu_count": _cpu_count(),
        "cpu": _cpu_model(),
        "xla_flags": relative_paths(os.environ.get("XLA_FLAGS", "")),
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def origin_line(env: Mapping[str, Any]) -> str:
    """The last line of a page: what `environment` said, as a sentence."""
    commit = f"{env['commit'] or 'unknown'}{' with local changes' if env['dirty'] else ''}"
    return f"Command: `{env['command']}`; commit {commit}; device {device_line(env)}; jax {env['jax']}; {env['date']}."


def device_line(env: Mapping[str, Any]) -> str:
    """The device of `environment` and the CPUs beside it: "cpu, 2 CPUs (AMD EPYC, family 25, model 17)"."""
    cpu = f" ({env['cpu']})" if env.get("cpu") else ""  # results of before it was recorded lack it
    return f"{env['device']}, {env['cpu_count']} CPUs{cpu}"


def command_line() -> str:
    """How this process was started, as one would type it, absolute paths shortened (see `relative_paths`)."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:  # python -m name
        head = f"python -m {spec.name.removesuffix('.__main__')}"
    elif sys.argv[0].endswith(".py"):
        head = f"python {relative_paths(sys.argv[0])}"
    else:  # a console script, or an interactive session
        head = Path(sys.argv[0]).name or "python"
    return " ".join([head, *(relative_paths(a) for a in sys.argv[1:])])


def relative_paths(text: str) -> str:
    """`text` with absolute paths made relative to the working directory, or cut to their last part where they lie outside it."""
    here = Path.cwd()

    def shorten(match: re.Match[str]) -> str:
        path = Path(match[0])
        return str(path.relative_to(here)) if path.is_relative_to(here) else path.name

    return _ABSOLUTE.sub(shorten, text)


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """(commit, uncommitted changes to the code) of the checkout at `root`; (None, None) for an installed copy or without git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True, text=True, timeout=30).stdout

    try:
        # An installed copy can lie in a virtual environment inside somebody else's repository: that one's commit says nothing.
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != root:
            return None, None
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--", *_CODE).strip())
    except (OSError, subprocess.SubprocessError):
        return None, None


def _cpu_count() -> int:
    """CPUs this process may use, which is what its speed depends on; containers see more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str | None:
    """The CPU's name, on Linux with its family and model where it says them: virtual machines call several generations just "AMD EPYC"."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or None
    text = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    parts = [f"{short}{found[name]}" for name, short in (("model name", ""), ("cpu family", "family "), ("model", "model ")) if name in found]
    return ", ".join(parts) or platform.machine() or None


def plain(value: Any) -> Any:
    """`value` as what JSON can hold: numpy and jax scalars as numbers, tuples as lists, paths as text, non-finite numbers as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and jax: scalars and small arrays
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write `values` (see `plain`) as indented JSON, whole or not at all."""
    atomic_write(path, (json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and never a part. Makes the directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]) -> str:
    """A Markdown table of `rows`. `columns`: the keys to show in order, or key -> heading. Missing values show as "-"; number columns align right.

    >>> print(markdown_table([{"method": "lora", "params": 4884480, "loss": 0.32891}], ["method", "params", "loss"]))
    | method | params | loss |
    |---|---:|---:|
    | lora | 4,884,480 | 0.3289 |
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    cells = [[plain(row.get(key)) for key in headings] for row in rows]

    def is_number(value: Any) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))

    right = [bool(cells) and all(is_number(row[i]) for row in cells) for i in range(len(headings))]
    lines = [[_cell(h) for h in headings.values()], *([_cell(v) for v in row] for row in cells)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("---:" if r else "---" for r in right) + "|", *text[1:]])


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case _:
            return str(value).replace("|", "\\|").replace("\n", " ")
