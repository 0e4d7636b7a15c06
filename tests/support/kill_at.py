"""`python kill_at.py CONFIG.json URL POINT.json`: a training run in a bucket that kills itself.

POINT: {"object": name, "nth": n, "when": "before" | "after"}: SIGKILL at the n-th put of an object
whose name ends so; {} never.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any


def kill_at(point: dict[str, Any]) -> None:
    import s3fs

    put, seen = s3fs.S3FileSystem._pipe_file, 0

    async def killing(self: Any, path: str, *args: Any, **settings: Any) -> Any:
        nonlocal seen
        hit = path.endswith(point["object"])
        seen += hit
        if hit and seen == point["nth"] and point["when"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await put(self, path, *args, **settings)
        if hit and seen == point["nth"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    s3fs.S3FileSystem._pipe_file = killing


if __name__ == "__main__":
    import zflora_jax as zf
    from zflora_jax.core.fields import from_dict

    config, url, where = sys.argv[1:]
    if where != "{}":
        kill_at(json.loads(where))
    zf.train(from_dict(zf.RunConfig, json.loads(config)), url, console=False)
