"""Checkpoints of a run: adapters, optimizer, step and data position, verified by a checksum.

Layout, on disk and in a bucket: checkpoints/<step>/<process>.safetensors holds the slices of the
state that lay on that process's devices, named "LEAF@START,..." after their first index in the
leaf. checkpoints/<step>/meta.json is written last: a step without it does not count. The frozen
base is not saved; its fingerprint is in meta.json. Which settings may go on from a checkpoint is in
`workdir`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path, is_store_error, local_file, remove, whole_file
from zflora_jax.core.trees import checksum
from zflora_jax.parallel.distributed import from_process_0, gather_bytes, on_main
from zflora_jax.reporting.files import write_json
from zflora_jax.training.trainer import TrainState
from zflora_jax.training.workdir import CHECKPOINTS, META, saved_steps

log = logging.getLogger(__name__)

Meta = dict[str, Any]


class SaveError(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


def require_same(saved: Meta, name: str, found: str, workdir: str | Path) -> None:
    """Refuses a checkpoint of `workdir` that was trained on another "base" or other "data".

    Args:
      saved: The checkpoint's meta.
      name: "base" or "data".
      found: Fingerprint of the base or data at hand.
      workdir: The run's directory, for the message.

    Raises:
      ConfigError: The fingerprints differ.
    """
    if saved[f"{name}_fingerprint"] != found:
        there, here = saved[f"{name}_fingerprint"][:12], found[:12]
        raise ConfigError(
            f"{workdir} was trained on another {name}: fingerprint {there} there, {here} here."
            " Restore it, or use another --workdir."
        )


class Checkpoints:
    """The checkpoints of one run; a context manager. A checkpoint is complete or is not seen.

    `save` copies the state to the host; one process writes the copy while training goes on. A save
    waits for the one before it, and leaving the context waits for the last. A failed write is
    raised there, as SaveError. All processes of a run call every method, with a workdir that they
    share; they write before `save` returns.

    Args:
      workdir: The run's directory or URL; checkpoints are in <workdir>/checkpoints.
      max_to_keep: How many of the newest checkpoints stay.
      keep_best: Whether the checkpoint with the lowest `loss` stays too.
      create: Whether to write; False to read only. A writer removes what killed processes left.
      before_commit: Called before a checkpoint counts; an exception from it prevents that.
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
        self._workdir = as_path(workdir, "workdir")
        self._max_to_keep, self._keep_best = max_to_keep, keep_best
        self._before_commit = before_commit
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._last_saved: int | None = None
        if create:
            on_main(self._clean_up)
            # A network file system can show another host an older list.
            self._last_saved = from_process_0(self.latest)

    @property
    def folder(self) -> Path:
        """Directory of the checkpoints; each has a folder in it, named after its step."""
        return self._workdir / CHECKPOINTS

    @property
    def latest(self) -> int | None:
        """The number of steps in the newest complete checkpoint, None if there is none."""
        return max(saved_steps(self._workdir), default=None)

    @property
    def best(self) -> int | None:
        """The number of steps in the checkpoint with the lowest loss, None if none was saved with
        its loss.
        """
        scored = []
        for step in saved_steps(self._workdir):
            with contextlib.suppress(FileNotFoundError, ValueError):  # removed meanwhile, damaged
                loss = self._read_meta(step).get("loss")
                scored += [(loss, step)] if loss is not None and math.isfinite(loss) else []
        return min(scored)[1] if scored else None

    def save(self, step: int, state: TrainState, meta: Meta, loss: float | None = None) -> None:
        """Saves after `step` finished steps; does nothing if that step was the last one saved.

        Args:
          step: Number of finished steps.
          state: The state to save. Its buffers may be overwritten as soon as this returns.
          meta: JSON values that `restore` returns.
          loss: Held-out loss of the state, if known; `best` goes by it.

        Raises:
          SaveError: This write, or the one before it, failed.
        """
        if step == self._last_saved:
            return
        leaves = _named(state)
        meta = {
            **({} if loss is None else {"loss": loss}),
            **meta,
            "state_checksum": checksum(state),
            "state": _shapes(leaves),
            "processes": jax.process_count(),
        }
        self._finish()
        slices = _slices(leaves)
        if jax.process_count() == 1:

            def write_all() -> None:
                self._write(step, slices)
                self._commit(step, meta)

            self._writing = self._thread.submit(write_all)
        else:
            self._write_together(step, slices, meta)
        self._last_saved = step

    def restore(self, like: Any, step: int | None = None) -> tuple[TrainState, Meta]:
        """Reads a checkpoint.

        Args:
          like: A TrainState of arrays or ShapeDtypeStructs. Each leaf is placed by its sharding,
            whatever mesh the run was saved on; without one, on the first device.
          step: Number of the checkpoint; None for the newest.

        Returns:
          (state, meta) as they were saved.

        Raises:
          ConfigError: There is no such checkpoint, it is damaged, or its store cannot be read; the
            message gives the remedy.
        """
        steps = saved_steps(self._workdir)
        step = max(steps, default=None) if step is None else step
        if step is None or step not in steps:
            raise ConfigError(
                f"{self.folder} has no checkpoint of step {step}; it has those of"
                f" {', '.join(map(str, steps)) or 'none'}."
            )
        try:
            meta = self._read_meta(step)
            state = self._read(step, like, meta)
            # Not every damaged byte makes a file unreadable.
            if checksum(state) != meta["state_checksum"]:
                raise ValueError("its values are not those that were saved")
        except Exception as error:  # of many types, whose messages name neither run nor remedy
            raise ConfigError(self._unreadable(step, steps, error)) from error
        return state, meta

    def _unreadable(self, step: int, steps: list[int], error: Exception) -> str:
        older = [s for s in steps if s != step]
        remedy = (
            f"Remove that folder to go on from step {max(older)}."
            if older
            else "It is the only one: start the run anew in another --workdir."
        )
        if is_store_error(error):  # it may be whole
            remedy = (
                "If the store or the network failed, run the same command again: nothing is lost."
                f" If it stays so while the store can be reached: {remedy[0].lower()}{remedy[1:]}"
            )
        return (
            f"checkpoint {self.folder / str(step)} cannot be read"
            f" ({type(error).__name__}: {str(error)[:200]}). {remedy}"
        )

    def _read_meta(self, step: int) -> Meta:
        meta: Meta = json.loads((self.folder / str(step) / META).read_text(encoding="utf-8"))
        return meta

    def _read(self, step: int, like: Any, meta: Meta) -> TrainState:
        from safetensors import safe_open

        leaves, arrays = _named(like), []
        if meta["state"] != _shapes(leaves):
            raise ValueError("its state has other names, shapes or dtypes")
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with contextlib.ExitStack() as stack:
            stored: dict[str, list[tuple[Any, str]]] = {name: [] for name in leaves}
            for process in range(meta["processes"]):
                path = self.folder / str(step) / f"{process}.safetensors"
                file = stack.enter_context(
                    safe_open(stack.enter_context(local_file(path)), framework="numpy")
                )
                for key in file.keys():  # noqa: SIM118  # it is no dict
                    stored[key.partition("@")[0]].append((file, key))
            for name, leaf in leaves.items():
                whole = np.zeros(leaf.shape, leaf.dtype)
                for file, key in stored[name]:
                    value = file.get_tensor(key).view(leaf.dtype)
                    starts = [int(start) for start in key.partition("@")[2].split(",") if start]
                    ends = [a + b for a, b in zip(starts, value.shape, strict=True)]
                    whole[tuple(map(slice, starts, ends))] = value
                where = getattr(leaf, "sharding", None) or first
                arrays.append(jax.make_array_from_callback(leaf.shape, where, whole.__getitem__))
        state: TrainState = jax.tree.unflatten(jax.tree.structure(like), arrays)
        return state

    def _write(self, step: int, slices: Mapping[str, np.ndarray]) -> None:
        from safetensors.numpy import save_file

        name = f"{jax.process_index()}.safetensors"
        with whole_file(self.folder / str(step) / name) as file:
            save_file(dict(slices), file)

    def _commit(self, step: int, meta: Meta) -> None:
        """Makes a checkpoint count, and removes those that it replaces."""
        self._before_commit()
        write_json(self.folder / str(step) / META, meta)
        steps = saved_steps(self._workdir)
        keep = {*steps[-self._max_to_keep :], *([self.best] if self._keep_best else ())}
        for folder in (self.folder / str(old) for old in steps if old not in keep):
            try:
                remove(folder / META)  # first: without it the rest does not count
                remove(folder)
            except Exception as error:
                if not isinstance(error, OSError) and not is_store_error(error):
                    raise
                log.warning("the old checkpoint %s could not be removed: %s", folder, error)

    def _write_together(self, step: int, slices: Mapping[str, np.ndarray], meta: Meta) -> None:
        """Writes the slices of all processes; the checkpoint counts once all of them are there."""
        failed: Exception | None = None
        try:
            self._write(step, slices)
        except Exception as error:  # whatever it is, the others must not wait
            failed = error
        said = gather_bytes(
            b"" if failed is None else f"{type(failed).__name__}: {failed}".encode()
        )
        with self._save_errors():
            if any(said):
                raise OSError(next(text.decode() for text in said if text)) from failed
            on_main(lambda: self._commit(step, meta))

    def _finish(self) -> None:
        """Waits for the write that goes on."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with self._save_errors():
                writing.result()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # stores raise many types
            raise SaveError(
                f"a checkpoint could not be written to {self.folder}"
                f" ({type(error).__name__}: {str(error)[:300]}). The checkpoints before it are"
                " whole: free some space or check the object store, then run the same command again"
                " to go on from the newest."
            ) from error

    def _clean_up(self) -> None:
        """Removes the steps that killed processes left without META."""
        if self.folder.is_dir():
            whole = saved_steps(self._workdir)
            for folder in self.folder.iterdir():
                if folder.name.isdigit() and int(folder.name) not in whole:
                    remove(folder)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._finish()
        except SaveError as error:
            if kind is None:
                raise
            log.error("%s", error)  # next to the error that is on its way
        finally:
            self._thread.shutdown()


def _named(state: Any) -> dict[str, Any]:
    """The leaves of a state by name: "adapters/layers/attn/q/forward"."""
    flat, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _shapes(leaves: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def _slices(leaves: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Copies of the slices that this process saves: of those that devices share, one holds the
    first replica. Types that numpy does not know are stored as unsigned integers of their width.
    """
    found = {}
    for name, leaf in leaves.items():
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                value = np.array(shard.data)  # a copy: training overwrites the buffers
                known = value.dtype.kind in "biuf"
                starts = ",".join(str(at.start or 0) for at in shard.index)
                found[f"{name}@{starts}"] = value if known else value.view(f"u{value.itemsize}")
    return found
