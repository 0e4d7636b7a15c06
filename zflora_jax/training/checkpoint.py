"""Checkpoints of a run: adapters, optimizer, step and data position, each save verified by a
checksum.

Layout: checkpoints/<step>/, see `checkpoint_files`. The frozen base is not saved; its
fingerprint is beside the state. Which settings may go on from a checkpoint is in `workdir`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path, is_url
from zflora_jax.core.trees import checksum, fingerprint
from zflora_jax.training.checkpoint_files import CheckpointFiles, DamagedError, InBucket, OnDisk
from zflora_jax.training.trainer import TrainState
from zflora_jax.training.workdir import CHECKPOINTS

log = logging.getLogger(__name__)


def _is_whole(state: TrainState, meta: dict[str, Any]) -> bool:
    """Whether the numbers of a restored state are those that were saved."""
    if "state_checksum" in meta:
        return checksum(state) == meta["state_checksum"]
    leaves = jax.tree.leaves(state)
    if "state_fingerprint" not in meta or not all(leaf.is_fully_addressable for leaf in leaves):
        return True
    # As earlier versions saved it, on the host.
    return fingerprint({str(i): leaf for i, leaf in enumerate(leaves)}) == meta["state_fingerprint"]


def require_same(saved: dict[str, Any], name: str, found: str, workdir: str | Path) -> None:
    """Refuse a checkpoint of `workdir` that was trained on another "base" or other "data".

    Args:
      saved: what the checkpoint says beside its state.
      name: "base" or "data".
      found: the fingerprint of what is here now.
      workdir: for the message.

    Raises:
      ConfigError: the fingerprints differ.
    """
    if saved[f"{name}_fingerprint"] != found:
        there, here = saved[f"{name}_fingerprint"][:12], found[:12]
        raise ConfigError(
            f"{workdir} was trained on another {name}: fingerprint {there} there, {here} here."
            " Restore it, or use another --workdir."
        )


def _is_damage(error: Exception) -> bool:
    """Whether an error of reading from a bucket says that an object is missing or damaged. Others
    may be of the network: what they happened to must not be removed.
    """
    known = (DamagedError, FileNotFoundError, json.JSONDecodeError)
    return isinstance(error, known) or str(error).startswith("NOT_FOUND")  # as tensorstore says it


def _on_cpu(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and any(
        getattr(device, "platform", "") == "cpu" for device in leaf.sharding.device_set
    )


class SaveError(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


class Checkpoints:
    """The checkpoints of one run; a context manager. Saving is atomic: a checkpoint is complete or
    is not seen.

    The state is copied, and the copy written while training goes on. A save waits for the one
    before it, and leaving the context waits for the last. A failed write is raised there, as
    SaveError. All processes of a run call every method, with a workdir that they share.

    Args:
      workdir: of the run; checkpoints are in <workdir>/checkpoints.
      max_to_keep: how many of the newest checkpoints stay.
      keep_best: keep the checkpoint with the lowest `loss` too.
      create: make the directory, and clean up what killed processes left in it; False to read only.
      before_commit: in a bucket, called before a checkpoint counts; what it raises prevents that.
    """

    def __init__(
        self,
        workdir: str | Path,
        max_to_keep: int = 1,
        *,
        keep_best: bool = False,
        create: bool = True,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        folder = as_path(workdir, "workdir") / CHECKPOINTS
        self._folder = folder
        self._files: CheckpointFiles = (
            InBucket(folder, max_to_keep, keep_best, create, before_commit)
            if is_url(folder)
            else OnDisk(folder, max_to_keep, keep_best, create)
        )

    @property
    def folder(self) -> Path:
        """Where they are: each has a folder of its own in it, named after its step."""
        return self._folder

    @property
    def latest(self) -> int | None:
        """The number of steps in the newest complete checkpoint, None if there is none."""
        return max(self._files.steps(), default=None)

    @property
    def best(self) -> int | None:
        """The number of steps in the checkpoint with the lowest loss, None if none was saved with
        its loss.
        """
        losses = {}
        for step in self._files.steps():
            with contextlib.suppress(FileNotFoundError):  # a run that goes on has removed it
                losses[step] = self._files.read_meta(step).get("loss")
        scored = [
            (loss, step)
            for step, loss in losses.items()
            if loss is not None and math.isfinite(loss)
        ]
        return min(scored)[1] if scored else None

    def save(
        self, step: int, state: TrainState, meta: dict[str, Any], loss: float | None = None
    ) -> None:
        """Save after `step` finished steps; a step that is already saved is left alone.

        Args:
          step: number of finished steps.
          state: what is saved. Its buffers may be written to as soon as this returns.
          meta: JSON values that `restore` gives back.
          loss: held-out loss of the state, where it is known: `best` goes by it.

        Raises:
          SaveError: this write, or the one before it, failed.
        """
        if step == self.latest:
            return
        meta = meta if loss is None else meta | {"loss": loss}
        meta = meta | {"state_checksum": checksum(state)}
        # The next step is given the state's own buffers to write into. orbax has its copy on the
        # host before its save returns (replica_slices.transfer_arrays_to_host), but on a CPU that
        # is no copy.
        state = jax.tree.map(lambda leaf: jnp.copy(leaf) if _on_cpu(leaf) else leaf, state)
        with self._writing():
            self._files.wait()  # here, where no other run waits for it
            self._files.write(step, state, meta, loss)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many types
            remedy = "see to the store" if is_url(self._folder) else "free some space"
            raise SaveError(
                f"a checkpoint could not be written to {self._folder}"
                f" ({type(error).__name__}: {str(error)[:300]}). The checkpoints before it are"
                f" whole: {remedy}, then run the same command again to go on from the newest."
            ) from error

    def restore(self, like: Any, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Read a checkpoint.

        Args:
          like: a TrainState of arrays or ShapeDtypeStructs. Each leaf goes where its sharding says,
            whatever mesh the run was saved on; without one, to the first device.
          step: number of the checkpoint; None for the newest.

        Returns:
          (state, meta) as they were saved.

        Raises:
          ConfigError: there is no such checkpoint, it is damaged, or its store cannot be read; the
            message says what to do.
        """
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=getattr(x, "sharding", None) or first
            ),
            like,
        )
        steps = self._files.steps()
        step = self.latest if step is None else step
        if step not in steps:
            raise ConfigError(
                f"{self._folder} has no checkpoint of step {step}; it has those of"
                f" {', '.join(map(str, steps)) or 'none'}."
            )
        try:
            state, meta = self._files.read(step, abstract)
            # Not every damaged byte makes a file unreadable.
            if not _is_whole(state, meta):
                raise DamagedError("its numbers are not those that were saved")
        # Orbax and tensorstore raise many types, with messages that name neither run nor remedy
        except Exception as error:
            older = [s for s in steps if s != step]
            remedy = (
                f"Remove that folder to go on from step {max(older)}."
                if older
                else "It is the only one: start the run anew in another --workdir."
            )
            if is_url(self._folder) and not _is_damage(error):
                remedy = (
                    "If the store or the network failed, run the same command again: nothing is"
                    " lost. If it stays so while the store can be reached:"
                    f" {remedy[0].lower()}{remedy[1:]}"
                )
            folder = self._folder / str(step)
            raise ConfigError(
                f"checkpoint {folder} cannot be read ({type(error).__name__}: {str(error)[:200]})."
                f" {remedy}"
            ) from error
        return state, meta

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._writing():
                self._files.wait()
        except SaveError as error:
            if kind is None:
                raise
            log.error("%s", error)  # beside the error that is on its way
        finally:
            self._files.close()
