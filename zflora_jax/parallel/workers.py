"""Processes that share a list of work, each on CPU cores of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from zflora_jax.core.fields import require


def cores_of(workers: int) -> list[set[int]]:
    """The cores of each worker: those of this process, divided as evenly as they can be.

    Raises:
      ConfigError: there are fewer cores than workers.
    """
    pinned = hasattr(os, "sched_getaffinity")
    cores = sorted(os.sched_getaffinity(0)) if pinned else list(range(os.cpu_count() or 1))
    require(
        1 <= workers <= len(cores),
        f"workers={workers}: must be within 1..{len(cores)}, the cores that this process may use.",
    )
    return [set(cores[i::workers]) for i in range(workers)]


def run_pinned(command: Sequence[str], workers: int) -> list[int]:
    """Run `workers` copies of a command at the same time, each on its own cores (on Linux; other
    systems place them as they like), and wait for all of them. SIGTERM is passed on.

    A program of XLA's CPU backend takes as many threads as its process may use cores. Two processes
    of one core each trained 6 to 14% more tokens than one of two (measured twice, on two
    generations of a CPU, docs/experiments.md).

    Args:
      command: a program and its arguments.
      workers: how many.

    Returns:
      Their exit codes, as a shell has them: 128 and its number for the signal that ended one.

    Raises:
      ConfigError: there are fewer cores than workers.
    """
    places = cores_of(workers)
    processes: list[subprocess.Popen[bytes]] = []
    with _passed_on(processes):
        for cores in places:
            processes.append(subprocess.Popen(command))
            if hasattr(os, "sched_setaffinity"):
                # Before it has threads: they take over the affinity of the one that starts them.
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(processes[-1].pid, cores)
        codes = [process.wait() for process in processes]
    return [code if code >= 0 else 128 - code for code in codes]


@contextlib.contextmanager
def _passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within it SIGTERM and SIGINT are the processes' to answer; a terminal sends SIGINT to all."""

    def pass_on(number: int, _: Any) -> None:
        for process in processes:
            process.send_signal(number)

    handlers = {signal.SIGTERM: pass_on, signal.SIGINT: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
