"""Runs a LiteRT file for benchmarks/on_device.py, in an environment with the extra `litert`.

Command: PYTHON tools/litert_worker.py JOB, see `serve`. The protocol is that of
tools/llama_cpp_worker.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
THREADS = 1


def timed(model: Any, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens and milliseconds: of the prompt and the first token (ttft), and of each of the
    others (tpot, the mean), as wall time and as the process's CPU time.

    Args:
      model: a `LiteRTModel`.
      prompt: token ids.
      new_tokens: how many to decode, at least 2.
    """
    from time import perf_counter, process_time

    model.clear()
    times = [(perf_counter(), process_time())]
    model.read(prompt[:-1])
    found = [int(model.step(prompt[-1], len(prompt) - 1).argmax())]
    times.append((perf_counter(), process_time()))
    for i in range(new_tokens - 1):
        found.append(int(model.step(found[-1], len(prompt) + i).argmax()))
    times.append((perf_counter(), process_time()))
    row: dict[str, Any] = {"tokens": found}
    for clock, suffix in enumerate(("ms", "cpu_ms")):
        start, first, last = (1e3 * at[clock] for at in times)
        row[f"ttft_{suffix}"] = first - start
        row[f"tpot_{suffix}"] = (last - first) / (new_tokens - 1)
    return row


def serve(job: dict[str, Any]) -> None:
    """Load job["litert"] and answer each line of standard input, a JSON object of "prompt" and
    "new_tokens", by a line of `timed`.
    """
    from zflora_jax.hf.litert_run import LiteRTModel

    model = LiteRTModel(job["litert"], THREADS)
    if model.context < job["longest"]:
        raise SystemExit(f"error: {job['litert']} holds {model.context} tokens")
    print(json.dumps("loaded"), flush=True)
    for line in sys.stdin:
        print(json.dumps(timed(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
