"""Training runs that are killed, in processes of their own.

`python killed.py CONFIG.json WORKDIR NAME NTH WHEN`: a run that kills itself (SIGKILL) "before" or
"after" the NTH time that a file whose path ends with NAME appears, on disk or in a bucket.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


def kill_at(name: str, nth: int, when: str) -> None:
    """Kills this process at the point of the arguments."""
    from zflora_jax.core import storage

    seen = 0

    def killing(place: Any) -> Any:
        def placed(source: Any, target: Any) -> None:
            nonlocal seen
            hit = os.fspath(target).endswith(name)
            seen += hit
            if hit and seen == nth and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            place(source, target)
            if hit and seen == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        return placed

    # `whole_file` and `Mirror` place every file by one of these, orbax its directories by rename.
    storage.os.replace = killing(os.replace)
    storage.os.rename = killing(os.rename)
    storage.put_file = killing(storage.put_file)


def killed_run(run: Any, workdir: Any, name: str, nth: int = 1, when: str = "before") -> None:
    """Trains `run` in a process, compiled as in this one (conftest.py), that is killed."""
    import jax

    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    if kept := jax.config.jax_compilation_cache_dir:
        # It reads the kept programs, and writes none, of which a kill might leave half.
        least = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
        env |= {"JAX_COMPILATION_CACHE_DIR": str(kept), least: "1e9"}
    words = [json.dumps(dataclasses.asdict(run)), str(workdir), name, str(nth), when]
    process = subprocess.run(
        [sys.executable, __file__, *words], env=env, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]


if __name__ == "__main__":
    # transformers would load it, for 3 seconds.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import zflora_jax as zf
    from zflora_jax.core.fields import from_dict

    config, workdir, name, nth, when = sys.argv[1:]
    kill_at(name, int(nth), when)
    zf.train(from_dict(zf.RunConfig, json.loads(config)), workdir, console=False)
