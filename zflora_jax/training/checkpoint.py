"""A run's directory: its config, and orbax checkpoints of adapters, optimizer, step and data
position.

Layout: config.json (the RunConfig, written before the first step), checkpoints/<step>/ (orbax; one
item "state", one item "meta"). The frozen base is not saved; its fingerprint is. Resume order:
config.json must agree, then the base's fingerprint, then the newest checkpoint's state replaces the
fresh one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.core.fields import ConfigError, require, to_dict
from zflora_jax.core.run_config import RunConfig, from_file
from zflora_jax.core.trees import checksum, fingerprint
from zflora_jax.data.dates import dated
from zflora_jax.reporting.files import write_json
from zflora_jax.training.identity import FREE, ROUNDING, differences
from zflora_jax.training.starts import first_day
from zflora_jax.training.trainer import TrainState

log = logging.getLogger(__name__)


def read_config(workdir: str | Path) -> RunConfig:
    """The RunConfig of a run. ConfigError if `workdir` holds none."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{workdir} holds no run (no config.json in it). Give the --workdir of a training run,"
            " or --model for a model directory."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not valid JSON ({error}); restore it from a copy, or start a new run in"
            " another directory."
        ) from None
    run = from_file(RunConfig, values)
    # A run that is older than the setting was told the day of its start.
    day = run.data.date or first_day(workdir)
    return dated(run, day) if day else run


Changes = dict[str, tuple[Any, Any]]  # a setting's dotted name -> (what it was, what it is now)


def adopt(workdir: str | Path, run: RunConfig) -> tuple[RunConfig, Changes]:
    """`run` as it starts or goes on in `workdir`, and the settings that change with it there.

    What `run` leaves open is taken from the run that is there, else decided now: data.date, which
    is today for a new run, and adapter.init, since how an adapter started is past.

    A run that has saved no step yet may change in everything; one that is finished keeps all that
    its numbers were computed with.

    Raises:
      ConfigError: `run` changes what the run there cannot go on with, every such setting named, or
        asks for fewer steps than are finished.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        unclear = (
            f"{workdir} has checkpoints but no config.json, so it is unclear what they belong to."
            " Use another --workdir."
        )
        require(not (workdir / "checkpoints").exists(), unclear)
        return dated(run), {}
    there = read_config(workdir)
    run = dated(run, there.data.date)
    if run.adapter.init is None and run.adapter.method == there.adapter.method:
        run = replace(run, adapter=run.adapter.replace(init=there.adapter.init))
    changed = differences(dated(there, run.data.date), run)
    finished = _finished_steps(workdir)
    if not finished:  # nothing was trained with the settings that are there
        return run, {key.replace("/", "."): values for key, values in changed.items()}
    longer = ("train/steps",) if run.train.steps >= finished else ()
    refused = [key for key in changed if not key.startswith((*FREE, *ROUNDING, *longer))]
    if run.adapter.dropout and "data/grad_accum_steps" in changed:
        refused.append("data/grad_accum_steps")  # what drops out is drawn for each micro-batch
    if refused:
        rows = [
            f"  {key.replace('/', '.')}: {changed[key][0]!r} there, {changed[key][1]!r} now"
            for key in refused
        ]
        rows += [f"  ({finished} steps are finished there)"] if "train/steps" in refused else []
        advice = "Use another --workdir, or the same settings to resume it."
        raise ConfigError("\n".join([f"{workdir} holds a run with another config:", *rows, advice]))
    if (
        run.train.steps <= finished
    ):  # nothing is left to train: it was trained as the settings there say
        changed = {key: values for key, values in changed.items() if key not in ROUNDING}
        train = {
            name: getattr(there.train, name) for name in ("remat", "loss_chunk", "matmul_precision")
        }
        run = replace(run, train=replace(run.train, **train))
        run = replace(run, data=replace(run.data, grad_accum_steps=there.data.grad_accum_steps))
    return run, {key.replace("/", "."): values for key, values in changed.items()}


def _finished_steps(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=0)


def change_notes(changed: Changes, run: RunConfig) -> list[str]:
    """What the settings that a resumed run changes mean for its numbers, in words; nothing of those
    that mean nothing.
    """
    notes = [
        f"{key}: {old!r} before, {new!r} from here on. Rounding, memory and speed may change,"
        " nothing else does."
        for key, (old, new) in changed.items()
        if key.replace(".", "/") in ROUNDING
    ]
    if "train.steps" in changed:
        old, new = changed["train.steps"]
        if run.optim.schedule == "constant":
            rate = (
                "The learning rate is constant: the run is the one that was asked for so many steps"
                " at once."
            )
        else:
            rate = (
                f"From here on the learning rate follows the {run.optim.schedule} schedule of {new}"
                " steps; it jumps to there."
            )
        notes.append(f"train.steps: {old} before, {new} from here on. {rate}")
    return notes


def claim(workdir: str | Path, run: RunConfig) -> None:
    """Make `workdir` this run's: check it, then write its config.json, unless another process is
    training there (BusyError). ConfigError also where it cannot be written.
    """
    adopt(workdir, run)
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with locked(workdir):
            write_json(workdir / "config.json", to_dict(run))
    except OSError as error:
        raise ConfigError(
            f"cannot write to workdir {workdir}: {error.strerror}. Choose a directory that you may"
            " write to."
        ) from None


def require_own(workdir: str | Path, run: RunConfig) -> None:
    """ConfigError where another process has claimed `workdir` since `run` did; called under its
    lock.
    """
    require(
        read_config(workdir) == run,
        f"{workdir} was taken by a run of another config at the same moment. Use another"
        " --workdir.",
    )


class BusyError(ConfigError):
    """Another process trains in this workdir."""


# What file systems without locks answer: some network and FUSE mounts.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@functools.cache  # once for each workdir of a process
def _warn_unlocked(workdir: str, reason: str) -> None:
    log.warning(
        "The file system of %s has no locks (%s), so no other process can be kept out of it: see to"
        " it that only one trains there.",
        workdir,
        reason,
    )


@contextmanager
def locked(workdir: str | Path) -> Iterator[None]:
    """Hold `workdir` for this process alone (an advisory lock that ends with the process).
    BusyError if another process holds it.

    On a file system without locks nothing is held, and a warning says so.
    """
    with open(Path(workdir) / ".lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{workdir} is being trained by another process. Wait for it to end, or use another"
                " --workdir."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _warn_unlocked(str(workdir), error.strerror)
        try:
            yield
        # Not by closing alone: a child that another thread is just starting has the file open until
        # it runs its program
        finally:
            with contextlib.suppress(
                OSError
            ):  # without locks there is none to give back; else closing does it
                fcntl.flock(file, fcntl.LOCK_UN)


def _is_whole(state: TrainState, meta: dict[str, Any]) -> bool:
    """Whether the numbers of a restored state are those that were saved."""
    if "state_checksum" in meta:
        return checksum(state) == meta["state_checksum"]
    leaves = jax.tree.leaves(state)
    if "state_fingerprint" not in meta or not all(leaf.is_fully_addressable for leaf in leaves):
        return True
    # As earlier versions saved it, on the host.
    return fingerprint({str(i): leaf for i, leaf in enumerate(leaves)}) == meta["state_fingerprint"]


def _on_cpu(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and any(
        getattr(device, "platform", "") == "cpu" for device in leaf.sharding.device_set
    )


# orbax numbers its saves by a counter of the process, and what a save starts reads "the current
# one": two that begin together wait for each other's directories, or write before their own are
# there.
_SAVING = threading.Lock()


class SaveError(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


class Checkpoints:
    """The checkpoints of one run; a context manager. Saving is atomic: a checkpoint is complete or
    is not seen.

    The state is copied, and the copy written while training goes on; a save waits for the one
    before it, and leaving the context for the last. A failed write surfaces there, as SaveError.
    Kept are the newest `keep`, and with keep_best the one with the lowest `loss` too. All processes
    of a run call every method; their workdir must be a directory that they share.
    """

    def __init__(
        self, workdir: str | Path, keep: int = 1, *, keep_best: bool = False, create: bool = True
    ) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        policies: list[Any] = [LatestN(keep)]
        best: dict[str, Any] = {}
        if keep_best:
            by_loss = lambda metrics: metrics["loss"]  # noqa: E731
            policies.append(
                BestN(
                    get_metric_fn=by_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
                )
            )
            # Without it orbax forgets the losses when the process ends.
            best = {
                "best_fn": by_loss,
                "best_mode": "min",
            }
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            create=create,
            cleanup_tmp_directories=create,
            **best,
        )
        self._ocp, self._manager = (
            ocp,
            ocp.CheckpointManager((Path(workdir) / "checkpoints").absolute(), options=options),
        )

    @property
    def latest(self) -> int | None:
        """The number of steps in the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The number of steps in the checkpoint with the lowest loss, None if none was saved with
        its loss.
        """
        only_meta = self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
        losses = {
            step: self._manager.restore(step, args=only_meta)["meta"].get("loss")
            for step in self._manager.all_steps()
        }
        scored = [
            (loss, step)
            for step, loss in losses.items()
            if loss is not None and math.isfinite(loss)
        ]
        return min(scored)[1] if scored else None

    def save(
        self, step: int, state: TrainState, meta: dict[str, Any], loss: float | None = None
    ) -> None:
        """Save after `step` finished steps; a step that is already saved is left alone. loss: what
        `best` goes by, where it is known.
        """
        if step == self.latest:
            return
        meta = meta if loss is None else meta | {"loss": loss}
        meta = meta | {"state_checksum": checksum(state)}
        # The next step is given the state's own buffers to write into. orbax has its copy on the
        # host before its save returns (replica_slices.transfer_arrays_to_host), but on a CPU that
        # is no copy.
        state = jax.tree.map(lambda leaf: jnp.copy(leaf) if _on_cpu(leaf) else leaf, state)
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), meta=self._ocp.args.JsonSave(meta)
        )
        with self._writing():
            self._manager.wait_until_finished()  # here, where no other run waits for it
            with _SAVING:
                self._manager.save(
                    step, args=args, metrics=None if loss is None else {"loss": loss}
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many types
            raise SaveError(
                f"a checkpoint could not be written to {self._manager.directory}"
                f" ({type(error).__name__}: {str(error)[:200]}). The checkpoints before it are"
                " whole: free some space, then run the same command again to go on from the"
                " newest."
            ) from error

    def restore(self, like: Any, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """(state, meta) of the newest checkpoint, or of `step`. ConfigError if it cannot be read.

        like: a TrainState of arrays or ShapeDtypeStructs. Each leaf goes where its sharding says,
        whatever mesh the run was saved on; without one, to the first device.
        """
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first
            ),
            like,
        )
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(abstract), meta=self._ocp.args.JsonRestore()
        )
        steps = sorted(self._manager.all_steps())
        step = self.latest if step is None else step
        if step not in steps:
            raise ConfigError(
                f"{self._manager.directory} has no checkpoint of step {step}; it has those of"
                f" {', '.join(map(str, steps)) or 'none'}."
            )
        try:
            found = self._manager.restore(step, args=args)
            if not _is_whole(
                found["state"], found["meta"]
            ):  # not every damaged byte makes a file unreadable
                raise ValueError("its numbers are not those that were saved")
        # Orbax and tensorstore raise many types, with messages that name neither run nor remedy
        except Exception as error:
            older = [s for s in steps if s != step]
            remedy = (
                f"Remove that folder to go on from step {max(older)}."
                if older
                else "It is the only one: start the run anew in another --workdir."
            )
            folder = Path(self._manager.directory) / str(step)
            raise ConfigError(
                f"checkpoint {folder} cannot be read ({type(error).__name__}: {str(error)[:200]})."
                f" {remedy}"
            ) from error
        return found["state"], found["meta"]

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._writing():
                self._manager.wait_until_finished()
        except SaveError as error:
            if kind is None:
                raise
            log.error("%s", error)  # beside the error that is on its way
        finally:
            self._manager.close()
