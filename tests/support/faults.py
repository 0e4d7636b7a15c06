"""Faults that a training run must survive, each as one try. `test_faults.py` tries some within its
own process, `soak.py` (make soak) all of them, many times, with processes of their own.

To survive: exit code and message are the documented ones, and the run that goes on afterwards ends
with the parameters, optimizer state, losses and batches of an uninterrupted one, bit for bit
(within 2e-5 on another mesh).
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from support.lab import Lab, Outcome


def stop_signals(lab: Lab, workdir: Path, draw: random.Random) -> Outcome:
    """SIGTERM after a step, and again before it has saved."""
    at = draw.randrange(1, lab.run.train.steps - 8)
    code, output = lab.once(workdir, {"signal_at": at})
    if code != 75 or lab.committed(workdir) != at or "stopped by a signal after step" not in output:
        return Outcome(False, 0, f"exit code {code}; {output[-500:]}")
    return lab.goes_on(workdir, at, output.strip().splitlines()[-1])


def kill(lab: Lab, workdir: Path, draw: random.Random) -> Outcome:
    """kill -9 at a random point of the process' life: start-up, steps, saves."""
    while True:
        process = lab.start(workdir)
        time.sleep(draw.uniform(0.2, 1.0) * lab.seconds)
        if process.poll() is None:
            break
        process.communicate()
        shutil.rmtree(workdir)  # it was faster than that: draw again
    process.kill()
    process.communicate()
    seen = (
        lab.logged(workdir)[-1][0]
        if (workdir / "metrics.jsonl").exists() and lab.logged(workdir)
        else 0
    )
    committed = lab.committed(workdir)
    return lab.goes_on(workdir, committed, f"killed after step {seen}, step {committed} was saved")


def terminate_twice(lab: Lab, workdir: Path, draw: random.Random) -> Outcome:
    """SIGTERM in a step, another while it saves."""
    process = lab.start(workdir)
    lab.wait_for(workdir, draw.randrange(1, lab.run.train.steps - 8), process)
    for pause in (draw.uniform(0.0, 0.1), 0.0):
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    code, output = lab.finish(process)
    last = lab.logged(workdir)[-1][0]
    if (
        code != 75
        or lab.committed(workdir) != last
        or "stopped by a signal after step" not in output
    ):
        return Outcome(False, 0, f"exit code {code}; {output[-500:]}")
    return lab.goes_on(workdir, last, output.strip().splitlines()[-1])


def disk_full(lab: Lab, workdir: Path, draw: random.Random) -> Outcome:
    """No file can grow beyond a few kilobytes from some step on (RLIMIT_FSIZE): a save fails, what
    was saved before is whole.
    """
    first = draw.randrange(2, lab.run.train.steps - 4, lab.run.train.save_every or 1)
    code, output = lab.once(workdir, {"stop_at": first})
    assert code == 75, output
    code, output = lab.once(workdir, {"file_limit": 9000})
    if code != 2 or "could not be written" not in output or lab.committed(workdir) != first:
        return Outcome(
            False, 0, f"exit code {code}, step {lab.committed(workdir)} of {first}; {output[-700:]}"
        )
    return lab.goes_on(workdir, first, output.strip().splitlines()[-1])


def no_directory(lab: Lab, workdir: Path, _: random.Random) -> Outcome:
    """A workdir that cannot be made: its parent is a file."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    workdir.write_text("kept")
    code, output = lab.once(workdir / "run")
    return Outcome(
        code == 2 and "cannot" in output and workdir.read_text() == "kept",
        0,
        output.strip().splitlines()[-1],
    )


def corrupt(lab: Lab, workdir: Path, draw: random.Random) -> Outcome:
    """A file of the newest checkpoint is cut, emptied, deleted or has a byte flipped: said at the
    resume, with the remedy, or without effect.
    """
    code, output = lab.once(workdir, {"stop_at": lab.run.train.steps - 3})
    assert code == 75, output
    newest = workdir / "checkpoints" / str(lab.committed(workdir))
    victim = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    content, how = victim.read_bytes(), draw.choice(("cut", "empty", "delete", "flip"))
    if how == "delete":
        victim.unlink()
    elif how == "flip" and content:
        at = draw.randrange(len(content))
        victim.write_bytes(
            content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
        )
    else:
        victim.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    what = f"{how} {victim.relative_to(newest)}"
    code, output = lab.once(workdir)
    if code == 0:  # the damage was in nothing that decides a number
        same = lab.state(workdir) == lab.whole and lab.logged(workdir) == lab.lines
        return Outcome(same, 0, f"{what}: no effect")
    # Threads of orbax and tensorstore may have something to say after the message.
    told = next(
        (
            line
            for line in output.splitlines()
            if "cannot be read" in line and "Remove that folder" in line
        ),
        None,
    )
    if code != 2 or told is None:
        return Outcome(False, 0, f"{what}: exit code {code}; {output[-700:]}")
    shutil.rmtree(newest)
    return lab.goes_on(workdir, lab.committed(workdir), f"{what}: {told}")


def two_processes(lab: Lab, workdir: Path, draw: random.Random) -> Outcome:
    """A second process on the workdir is refused; the first does not notice."""
    first = lab.start(workdir)
    lab.wait_for(workdir, draw.randrange(1, 5), first)
    first.send_signal(signal.SIGSTOP)  # so that it is still there when the second has come that far
    code, output = lab.once(workdir)
    first.send_signal(signal.SIGCONT)
    done, log = lab.finish(first)
    if done != 0:
        return Outcome(False, 0, log[-700:])
    told = output.strip().splitlines()[-1]
    same = lab.state(workdir) == lab.whole and lab.logged(workdir) == lab.lines
    return Outcome(same and code == 2 and "another process" in told, 0, told)


NUMBERS = ("loss", "gradient", "data")


def not_a_number(
    lab: Lab,
    workdir: Path,
    draw: random.Random,
    kinds: tuple[str, ...] = NUMBERS,
) -> Outcome:
    """NaN in the loss, the gradient or the data: the run ends with 3 and the step named, nothing of
    it is saved.
    """
    at, what = draw.randrange(3, lab.run.train.steps), draw.choice(kinds)
    code, output = lab.once(workdir, {"poison": what, "at": at})
    told = output.strip().splitlines()[-1]
    if code != 3 or f"at step {at}" not in told or lab.committed(workdir) >= at:
        return Outcome(False, 0, f"exit code {code}; {output[-700:]}")
    return lab.goes_on(workdir, lab.committed(workdir), told)


def data_crash(lab: Lab, workdir: Path, draw: random.Random) -> Outcome:
    """The thread that makes batches raises: the run ends with that error, what was saved
    is whole.
    """
    code, output = lab.once(workdir, {"crash_data_at": draw.randrange(2, lab.run.train.steps)})
    if code in (0, 75) or "the data pipeline broke" not in output:
        return Outcome(False, 0, f"exit code {code}; {output[-700:]}")
    return lab.goes_on(workdir, lab.committed(workdir), "RuntimeError: the data pipeline broke")


def other_meshes(lab: Lab, workdir: Path, _: random.Random) -> Outcome:
    """1 device, then 2, 4 and 8, a quarter of the run on each: the same batches, losses within 2e-5
    of those of one device.
    """
    meshes = (
        {},
        {"mesh__fsdp": 2},
        {"mesh__data": 2, "mesh__fsdp": 2},
        {"mesh__data": 2, "mesh__fsdp": 4},
    )
    steps = lab.run.train.steps
    for i, mesh in enumerate(meshes):
        last = (i + 1) * steps // len(meshes)
        code, output = lab.once(
            workdir, {"stop_at": last} if last < steps else {}, devices=2**i, **mesh
        )
        if code != (75 if last < steps else 0):
            return Outcome(False, 0, f"{2**i} devices: exit code {code}; {output[-700:]}")
    got, want = lab.logged(workdir), lab.lines
    close = np.allclose([row[1] for row in got], [row[1] for row in want], rtol=2e-5)
    return Outcome(
        [row[::3] for row in got] == [row[::3] for row in want] and bool(close),
        0,
        "resumed on 2, 4 and 8 devices",
    )


def malformed_row(lab: Lab, workdir: Path, draw: random.Random) -> Outcome:
    """A row of the training file is not what it should be: an error that names file and row, before
    anything is trained.
    """
    folder = workdir.parent / f"{workdir.name}-data"
    folder.mkdir(parents=True)
    rows: list[Any] = [
        {"instruction": f"Say {i}.", "input": "", "output": str(i), "answer": str(i)}
        for i in range(20)
    ]
    bad = draw.randrange(20)
    rows[bad] = draw.choice(
        (
            {"instruction": "Say."},
            {"instruction": 3, "output": "x"},
            "text",
            None,
            {**rows[bad], "output": None},
        )
    )
    (folder / "train.json").write_text(json.dumps(rows))
    code, output = lab.once(
        workdir, data__task="rows", data__data_dir=str(folder), data__train_limit=None
    )
    told = output.strip().splitlines()[-1]
    return Outcome(
        code == 2 and f"train.json, row {bad + 1}" in told and not workdir.exists(),
        0,
        f"{rows[bad]!r}: {told}",
    )


Fault = Callable[[Lab, Path, random.Random], Outcome]

FAULTS: dict[str, tuple[Fault, int]] = {
    "kill -9 at a random point": (kill, 50),
    "SIGTERM twice": (terminate_twice, 10),
    "disk full": (disk_full, 5),
    "workdir cannot be made": (no_directory, 1),
    "newest checkpoint damaged": (corrupt, 20),
    "two processes on one workdir": (two_processes, 3),
    "NaN in loss, gradient or data": (not_a_number, 6),
    "data pipeline crashes": (data_crash, 3),
    "mesh 1 -> 2 -> 4 -> 8": (other_meshes, 1),
    "malformed training row": (malformed_row, 5),
}
"""Name -> (one try, how many tries `make soak` makes)."""


LOCAL: dict[str, tuple[Fault, int]] = {
    "SIGTERM twice": (stop_signals, 1),
    "disk full": (disk_full, 1),
    "workdir cannot be made": (no_directory, 1),
    "newest checkpoint damaged": (corrupt, 3),
    "NaN in gradient": (partial(not_a_number, kinds=("gradient",)), 1),
    "data pipeline crashes": (data_crash, 1),
    "malformed training row": (malformed_row, 3),
}
"""Name -> (one try within a process, how many `make test` makes)."""


def tries(
    lab: Lab, name: str, attempt: Fault, count: int, folder: Path
) -> Iterator[Callable[[], Outcome]]:
    """`count` tries of a fault, to be called, each with its own workdir and random draws."""
    stem = re.sub(r"[^a-z]+", "-", name.lower())
    for i in range(count):
        yield partial(attempt, lab, folder / f"{stem}-{i}", random.Random(f"{name}-{i}"))
