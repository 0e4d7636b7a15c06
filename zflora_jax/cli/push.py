"""`zflora push`."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from zflora_jax.cli.options import CommandParser
from zflora_jax.core.fields import ConfigError, require

SUMMARY = "Send a task's slices to a vLLM that serves its base, and load them there."
KEY = "VLLM_API_KEY"  # environment: the server's, if it has one


def add_options(parser: CommandParser) -> None:
    parser.add_argument("slices", metavar="FILE", help="of `zflora export --format slices`")
    parser.option("--server", "URL", "such as http://localhost:8000", required=True)
    parser.option("--task", "NAME", "its name there; an older one is replaced (default: FILE's)")


def run(args: argparse.Namespace) -> None:
    path = Path(args.slices)
    require(path.is_file(), f"{path} is no file: give one of `zflora export --format slices`.")
    task, server = args.task or path.stem, args.server.rstrip("/").removesuffix("/v1")
    require(server.startswith("http"), f"server={server!r}: begin with http:// or https://.")
    require("/" not in task, f"task={task!r}: a name has no '/'.")
    _ask(server, "GET", "tasks")  # a missing key is said before the file is sent
    _ask(server, "PUT", f"slices/{urllib.parse.quote(task, safe='')}", path.read_bytes())
    found = _ask(server, "POST", "load", json.dumps({"task": task}).encode())
    print(f"task {task} is loaded (sha256 {found['sha256'][:12]}): use model NAME:{task}")


def _ask(server: str, method: str, path: str, data: bytes | None = None) -> dict[str, Any]:
    """The answer of a route of zflora_vllm; ConfigError with what the server says."""
    key = os.environ.get(KEY)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"{server}/v1/zflora/{path}"
    try:
        asked = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(asked, timeout=600) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = f"{error.reason}; is {KEY} its key, and does it run with VLLM_PLUGINS=zflora?"
        raise ConfigError(f"{server} refuses {path} ({error.code}): {text}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ConfigError(f"{server} cannot be asked: {error}") from None
