"""Several processes as one run, with JAX's distributed runtime; stopping all after the same step.

Every process runs the same program on the same global arrays; only process 0 writes logs, metrics
and reports. A run that gets SIGTERM or SIGINT finishes its step, saves, and raises `Preempted`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from zflora_jax.core.fields import ConfigError, first_line, require
from zflora_jax.core.storage import as_path

T = TypeVar("T")

SHARED_WITHIN = 10.0  # seconds until every process must see a new file

ENVIRONMENT = {
    "coordinator": "ZFLORA_COORDINATOR",
    "num_processes": "ZFLORA_NUM_PROCESSES",
    "process_id": "ZFLORA_PROCESS_ID",
}


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    detect: bool = False,
) -> None:
    """Joins the processes of a run. Call it before anything touches a device. It does nothing in a
    run of one process, or in a process that has already joined.

    Each of the first three can come from the environment instead (see `ENVIRONMENT`); all or none
    must be given.

    Args:
      coordinator: "host:port" of process 0, which all processes can reach.
      num_processes: Number of processes.
      process_id: Number of this process, from 0.
      detect: Whether JAX finds the three itself: SLURM, Open MPI, Kubernetes (needs the package
        `kubernetes`), Cloud TPU.

    Raises:
      ConfigError: Some of the three are missing or impossible, or the runtime does not start.
    """
    if jax.distributed.is_initialized():
        return
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    values = {
        name: os.environ.get(ENVIRONMENT[name]) if value is None else value
        for name, value in given.items()
    }
    missing = [name for name, value in values.items() if value in (None, "")]
    if len(missing) == 3:
        if detect:
            _initialize("by detection (SLURM, Open MPI, Kubernetes, Cloud TPU)")
        return
    require(
        not detect,
        "--distributed finds the processes by itself: leave out --coordinator, --num-processes and"
        " --process-id (and their variables).",
    )
    options = ", ".join(f"--{name.replace('_', '-')} (or {ENVIRONMENT[name]})" for name in missing)
    require(not missing, f"a run of several processes needs {options} too.")
    count, number = (_whole(name, values[name]) for name in ("num_processes", "process_id"))
    require(
        number < count,
        f"--process-id {number} of --num-processes {count}: processes are numbered from 0 to"
        f" {count - 1}.",
    )
    if count > 1:
        address = str(values["coordinator"])
        _initialize(
            f"with --coordinator {address} (HOST:PORT of process 0)", address, count, number
        )


def _whole(name: str, value: object) -> int:
    require(str(value).isdigit(), f"--{name.replace('_', '-')} {value!r}: expected a whole number.")
    return int(str(value))


def _initialize(how: str, *given: Any) -> None:
    try:
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"JAX's distributed runtime did not start {how}: {first_line(error).rstrip('.')}."
            " Check that process 0 runs and that its port can be reached, or give --coordinator,"
            " --num-processes and --process-id."
        ) from error
    if not is_main():
        logging.getLogger("zflora_jax").setLevel(logging.WARNING)


def is_main() -> bool:
    """True if this process writes the logs, metrics and reports of the run."""
    return jax.process_index() == 0


def on_main(action: Callable[[], T]) -> T | None:
    """Runs `action` on process 0, while the others wait, and returns its result there, None on the
    others. Its error is raised on process 0, and a ConfigError on the others.
    """
    result, error = None, None
    try:
        result = action() if is_main() else None
    except Exception as raised:  # of any type: the others must not wait
        error = raised
    well = from_process_0(error is None)
    if error is not None:
        raise error
    require(well, "process 0 has failed; its message says why.")
    return result


def gather_bytes(own: bytes) -> list[bytes]:
    """The bytes of every process, in order, less than 2 GiB from each; all processes call this."""
    if jax.process_count() == 1:
        return [own]
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.frombuffer(own.ljust(int(max(sizes)), b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def from_process_0(value: Any) -> Any:
    """A JSON value of process 0, in all processes, which all call this."""
    if jax.process_count() == 1:
        return value
    return json.loads(gather_bytes(json.dumps(value).encode() if is_main() else b"")[0])


def require_equal(own: Mapping[str, Any]) -> None:
    """Compares JSON values by name over the processes of a run, which all call this. All raise
    ConfigError if some differ; the message has their names, and the values of every process.
    """
    if jax.process_count() == 1:
        return
    every = [json.loads(part) for part in gather_bytes(json.dumps(own).encode())]
    lines = []
    for name in dict.fromkeys(name for one in every for name in one):
        found: dict[str, list[str]] = {}
        for number, one in enumerate(every):
            value = json.dumps(one[name]) if name in one else "not given"
            found.setdefault(value, []).append(str(number))
        if len(found) > 1:
            values = (f"{value} in process {', '.join(at)}" for value, at in found.items())
            lines.append(f"  {name}: {'; '.join(values)}")
    require(
        not lines,
        "\n".join(["the processes of this run differ:", *lines])
        + "\nGive every process the same command, settings, model and data.",
    )


def require_shared(folder: str | os.PathLike[str], name: str = "workdir") -> None:
    """Raises ConfigError in all processes unless all see a file of process 0 in `folder`, a
    directory or URL that the message calls `name`. Otherwise processes with different workdirs
    would wait for each other forever at the first save.
    """
    if jax.process_count() == 1:
        return
    # A file of an earlier start has another name.
    file = as_path(f"{os.fspath(folder)}/.shared-{from_process_0(secrets.token_hex(4))}", name)

    def write() -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(file.name, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot write to {file.parent}: {error.strerror or error}. Choose a directory that"
                " you may write to."
            ) from None

    on_main(write)
    try:
        sees = np.asarray(_appears(file))
        blind = np.flatnonzero(~np.asarray(multihost_utils.process_allgather(sees))).tolist()
    finally:
        if is_main():
            with contextlib.suppress(OSError):
                file.unlink()
    require(
        not blind,
        f"{name} {folder} is not shared: of {jax.process_count()} processes,"
        f" {', '.join(map(str, blind))} did not see within {SHARED_WITHIN:g} s what process 0 wrote"
        " there. Give all processes one directory on a file system that all hosts mount (NFS,"
        " Lustre), or one URL of a bucket (s3://, gs://).",
    )


def _appears(file: Path) -> bool:
    """True if `file` becomes readable within SHARED_WITHIN; network file systems are late."""
    deadline = time.monotonic() + SHARED_WITHIN
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if file.read_text("utf-8") == file.name:
                return True
        time.sleep(0.1)
    return False


def leave(code: int, error: Exception | None = None) -> None:
    """Ends this process at once if it is one of several, after printing the traceback of `error`.
    The others are blocked in a collective, and JAX ends them when this one is gone.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        if error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class StopSignals:
    """A context in which SIGTERM and SIGINT ask for a stop instead of ending the process.

    With several processes, one signal to one of them is enough: JAX's preemption service, which
    handles SIGTERM there, stops all of them after the same step. Python has no signals outside the
    main thread, so the signals that the main thread catches count there.
    """

    _of_main: StopSignals | None = None

    def __init__(self) -> None:
        self._asked, self._next = False, 1
        self._shared: StopSignals | None = None
        self._before: dict[int, object] = {}

    @property
    def asked(self) -> bool:
        """True if this process has received a signal."""
        return self._asked or (self._shared is not None and self._shared._asked)

    def requested(self, step: int) -> bool:
        """True to stop after `step`, the same in all processes, which call this every step."""
        if jax.process_count() == 1:
            return self.asked
        # JAX counts calls: a signal before the first one requests a stop at call 1, whatever step a
        # resumed run has then.
        first, self._next = self._next, step + 1
        return any(
            [multihost_utils.reached_preemption_sync_point(n) for n in range(first, step + 1)]
        )

    def _ask(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        # os.write: logging takes locks, which the interrupted code may hold.
        doing = "already stopping" if self._asked else "stopping after this step, then saving"
        os.write(2, f"{name}: {doing}\n".encode())
        self._asked = True
        if jax.process_count() > 1 and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> StopSignals:
        self._shared = StopSignals._of_main
        if threading.current_thread() is threading.main_thread():
            caught = [signal.SIGINT] + [signal.SIGTERM] * (jax.process_count() == 1)
            self._before = {number: signal.signal(number, self._ask) for number in caught}
            StopSignals._of_main = self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if StopSignals._of_main is self:
            StopSignals._of_main = self._shared
