"""The origin of a result: command, code, software, device.

No absolute path and no host name is recorded, so that results can be published as they are.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The code behind a result. Other files (notes, results being written) do not make a commit "dirty".
_CODE = (
    *("zflora_jax", "configs", "benchmarks", "studies", "train.py", "eval.py"),
    *("pyproject.toml", "constraints.txt"),
)
_ABSOLUTE = re.compile(r"(?<![\w./:~-])/[^\s,=:'\"]+")  # not the slashes of a/b, ./a, ~/a or a URL


def environment() -> dict[str, Any]:
    """The command, code, software and device behind a result, as JSON. Starts jax's backend."""
    import jax

    commit, dirty = _git_state(Path(__file__).resolve().parents[2])
    devices, linux = jax.devices(), hasattr(os, "sched_getaffinity")
    return {
        "command": command_line(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        # CPUs that this process may use; containers see more.
        "cpu_count": len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1,
        "cpu": cpu_model(),
        "xla_flags": relative_paths(os.environ.get("XLA_FLAGS", "")),
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def origin_line(env: Mapping[str, Any]) -> str:
    """The last line of a page: the `environment` as a sentence."""
    commit = env.get("commit") or "unknown"
    changed = " with local changes" if env.get("dirty") else ""
    cpu = f" ({env['cpu']})" if env.get("cpu") else ""
    return (
        f"Command: `{env['command']}`; commit {commit}{changed}; device {env['device']},"
        f" {env['cpu_count']} CPUs{cpu}; jax {env['jax']}; {env['date']}."
    )


def command_line() -> str:
    """The command that started this process, with absolute paths shortened."""
    head = Path(sys.argv[0]).name or "python"  # a console script, or an interactive session
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:  # python -m name
        head = f"python -m {spec.name.removesuffix('.__main__')}"
    elif head.endswith(".py"):
        head = f"python {relative_paths(sys.argv[0])}"
    return " ".join([head, *(relative_paths(a) for a in sys.argv[1:])])


def relative_paths(text: str) -> str:
    """Makes absolute paths in a text relative, or cuts foreign ones to their last part."""
    here = Path.cwd()

    def shorten(match: re.Match[str]) -> str:
        path = Path(match[0])
        return str(path.relative_to(here)) if path.is_relative_to(here) else path.name

    return _ABSOLUTE.sub(shorten, text)


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """(commit, whether the code has uncommitted changes); (None, None) outside a checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=30)

    try:  # an installed copy can lie inside another repository, whose commit is irrelevant
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != root:
            return None, None
        changed = git("status", "--porcelain", "--", *_CODE).strip()
        return git("rev-parse", "HEAD").strip(), bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None, None


def cpu_model() -> str | None:
    """The CPU's name with family and model, because several generations are named "AMD EPYC"."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine() or None
    text = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    shown = {"model name": "", "cpu family": "family ", "model": "model "}
    parts = [f"{short}{found[name]}" for name, short in shown.items() if name in found]
    return ", ".join(parts) or platform.machine() or None
