"""Checkpoints of a run: adapters, optimizer, step and data position, verified by checksums.

Layout, on disk and in a bucket: checkpoints/<step>/state/ is written by orbax, each slice of the
state by one of the processes that hold it. checkpoints/<step>/meta.json has the checksums of those
files and is written last: a step without it does not count. The frozen base is not saved; its
fingerprint is in meta.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax

from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.storage import Mirror, as_path, is_url, local_copy, remove
from zflora_jax.parallel.distributed import from_process_0, gather_bytes, is_main, on_main
from zflora_jax.reporting.files import write_json
from zflora_jax.training.trainer import TrainState
from zflora_jax.training.workdir import CHECKPOINTS, META, saved_steps

log = logging.getLogger(__name__)

Meta = dict[str, Any]
STATE = "state"  # in the folder of a step
T = TypeVar("T")


class SaveError(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


def require_same(saved: Meta, name: str, found: str, workdir: str | Path) -> None:
    """Raises ConfigError if the checkpoint of `workdir` with meta `saved` has another fingerprint
    than `found`. name: "base" or "data" of its training, or "eval", the rows of its best loss.
    """
    there = saved[f"{name}_fingerprint"]
    rows = "measured its best checkpoint on other held-out rows"
    require(
        there == found,
        f"{workdir} {rows if name == 'eval' else f'was trained on another {name}'} (fingerprint"
        f" {there[:12]} there, {found[:12]} here). Restore what was there, or use another"
        " --workdir.",
    )


class Checkpoints:
    """The checkpoints of one run; a context manager. Only complete checkpoints are visible.

    `save` copies the state to the host, and one process writes it while training goes on; the next
    save, or leaving the context, waits for that and raises SaveError if it failed. All processes of
    a run call every method, with one workdir; several write before `save` returns.

    Args:
      workdir: The run's directory or URL; checkpoints are in <workdir>/checkpoints.
      max_to_keep: Number of newest checkpoints that stay.
      keep_best: Whether the checkpoint with the lowest `loss` stays too.
      create: Whether to write; False only reads. A writer removes remains of killed processes.
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
        self._orbax = _checkpointer(self._workdir)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._last_saved: int | None = None
        if create:
            on_main(self._clean_up)
            # A network file system can show another host an older list.
            self._last_saved = from_process_0(self.latest)

    @property
    def folder(self) -> Path:
        """Directory of the checkpoints, a folder in it for each step."""
        return self._workdir / CHECKPOINTS

    @property
    def latest(self) -> int | None:
        """The number of steps in the newest checkpoint, None if there is none."""
        return max(saved_steps(self._workdir), default=None)

    @property
    def best(self) -> int | None:
        """The number of steps in the checkpoint with the lowest loss, None if none has its loss."""
        scored = []
        for step in saved_steps(self._workdir):
            with contextlib.suppress(FileNotFoundError, ValueError):  # removed meanwhile, damaged
                if (loss := self.meta_of(step).get("loss")) is not None:
                    scored.append((loss, step))
        return min(scored, default=(0, None))[1]

    def save(self, step: int, state: TrainState, meta: Meta, loss: float | None = None) -> None:
        """Saves the state after a step; does nothing if that step was the last one saved.

        Args:
          step: Number of finished steps.
          state: The state to save. Its buffers may be overwritten as soon as this returns.
          meta: JSON values that `restore` returns.
          loss: Held-out loss of the state, if known; `best` compares it.

        Raises:
          SaveError: This write, or the one before it, failed.
        """
        if step == self._last_saved:
            return
        import orbax.checkpoint as ocp

        self.finish()
        meta = {"loss": loss, **meta, "state": _shapes(state)}
        with self._save_errors(), contextlib.ExitStack() as opened:
            # Closed also where another process fails.
            mirror = lambda: contextlib.closing(Mirror(self.folder / str(step)))  # noqa: E731
            files = together(lambda: opened.enter_context(mirror()))
            together(lambda: require_room(files.path, state))
            to = files.path.absolute() / STATE
            self._orbax.save(to, ocp.args.PyTreeSave(state), force=True)
            opened.pop_all()  # `_complete` closes it
            if jax.process_count() > 1:
                self._complete(step, meta, files)
            else:
                self._writing = self._thread.submit(self._complete, step, meta, files)
        self._last_saved = step

    def restore(self, like: Any, step: int | None = None) -> tuple[TrainState, Meta]:
        """Returns (state, meta) of a checkpoint, as they were saved.

        Args:
          like: A TrainState of arrays or ShapeDtypeStructs. Each leaf is placed by its sharding,
            whatever mesh the run was saved on; without one, on the first device.
          step: Number of the checkpoint; None for the newest.

        Raises:
          ConfigError: There is no such checkpoint, it is damaged, or its store cannot be read.
        """
        steps = saved_steps(self._workdir)
        step = max(steps, default=None) if step is None else step
        if step is None or step not in steps:
            raise ConfigError(
                f"{self.folder} has no checkpoint of step {step}; it has those of"
                f" {', '.join(map(str, steps)) or 'none'}."
            )
        try:
            meta = self.meta_of(step)
            return self._read(step, like, meta), meta
        except Exception as error:  # of many types, whose messages name neither run nor remedy
            raise ConfigError(self._unreadable(step, steps, error)) from error

    def _unreadable(self, step: int, steps: list[int], error: Exception) -> str:
        older = [s for s in steps if s != step]
        remedy = f"remove that folder to resume from step {max(older, default=0)}."
        if not older:
            remedy = "start the run again in another --workdir: there is no other checkpoint."
        return (
            f"checkpoint {self.folder / str(step)} cannot be read"
            f" ({type(error).__name__}: {str(error)[:200]}). If the disk, the store or the network"
            f" failed, run the same command again: nothing is lost. Otherwise {remedy}"
        )

    def meta_of(self, step: int) -> Meta:
        """Returns the JSON values that `save` stored with the state of a step."""
        meta: Meta = json.loads((self.folder / str(step) / META).read_text("utf-8"))
        return meta

    def _read(self, step: int, like: Any, meta: Meta) -> TrainState:
        import orbax.checkpoint as ocp

        if meta["state"] != _shapes(like):
            raise ValueError("its state has other names, shapes or dtypes")
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda x: getattr(x, "sharding", None) or first, like)
        how = ocp.checkpoint_utils.construct_restore_args(like, shardings)
        args = ocp.args.PyTreeRestore(like, how)
        with _whole_copy(self.folder / str(step) / STATE, meta["files"]) as files:
            state: TrainState = self._orbax.restore(files.absolute(), args)
            return state

    def _complete(self, step: int, meta: Meta, files: Mirror) -> None:
        """Waits until all processes have written `files`, and makes the checkpoint count."""
        try:
            together(self._orbax.wait_until_finished)
            together(lambda: None if is_main() else files.sync())
            parts = gather_bytes(json.dumps(checksums(files.path / STATE)).encode())
            # Of a file that several processes have, process 0 uploads the last version.
            found = {name: x for part in parts[::-1] for name, x in json.loads(part).items()}
            on_main(lambda: self._commit(step, {**meta, "files": found}, files))
        finally:
            files.close()

    def _commit(self, step: int, meta: Meta, files: Mirror) -> None:
        """Makes a checkpoint count, and removes those that it replaces."""
        files.sync()
        self._before_commit()
        write_json(self.folder / str(step) / META, meta)
        steps = saved_steps(self._workdir)
        keep = {*steps[-self._max_to_keep :], *([self.best] if self._keep_best else ())}
        for folder in (self.folder / str(old) for old in steps if old not in keep):
            try:
                remove(folder / META)  # first: without it the rest does not count
                remove(folder)
            except Exception as error:  # stores raise many types
                log.warning("the old checkpoint %s could not be removed: %s", folder, error)

    def finish(self) -> None:
        """Waits for a write in progress."""
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
                " to resume from the newest."
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
            self.finish()
        except SaveError as error:
            if kind is None:
                raise
            log.error("%s", error)  # next to the error that is being raised
        finally:
            self._thread.shutdown()
            self._orbax.close()


def _checkpointer(workdir: Path) -> Any:
    """orbax's writer and reader. Processes that share a bucket each write to a directory of their
    own, and only files that no other process has.
    """
    import orbax.checkpoint as ocp

    separate = is_url(workdir) and jax.process_count() > 1
    processes = ocp.options.MultiprocessingOptions(primary_host=None if separate else 0)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=not separate, multiprocessing_options=processes)
    return ocp.AsyncCheckpointer(
        handler,
        multiprocessing_options=processes,
        # Otherwise runs in two threads would take each other's signals.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
    )


@contextlib.contextmanager
def _whole_copy(folder: Path, wanted: Mapping[str, str]) -> Iterator[Path]:
    """Yields a state's directory, or a bucket's copy, after checking `wanted`: name -> SHA-256."""
    with local_copy(folder, wanted) as files:
        found = checksums(files, wanted)
        if wrong := [name for name in wanted if found[name] != wanted[name]]:
            raise ValueError(f"its files differ from those that were saved: {', '.join(wrong[:4])}")
        yield files


def together(action: Callable[[], T]) -> T:
    """Runs `action` in every process; if it fails in one, all raise, and none waits forever."""
    failed, result = None, None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others must not wait
        failed = error
    texts = gather_bytes(b"" if failed is None else f"{type(failed).__name__}: {failed}".encode())
    if failed is not None:
        raise failed
    if any(texts):
        raise OSError(f"in another process: {next(filter(None, texts)).decode()}")
    return result  # type: ignore[return-value]


def checksums(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Name of each file below a local directory, or of `names` there -> SHA-256 of its content."""
    if names is None:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    found = {}
    for name in names:
        with open(folder / name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def require_room(folder: Path, state: Any) -> None:
    """Raises OSError if a local directory lacks room for the slices of `state` that this process
    writes. Failed writes of tensorstore would call back into closed event loops.
    """
    slices = [x for leaf in jax.tree.leaves(state) for x in leaf.addressable_shards]
    size = sum(x.data.nbytes for x in slices if x.replica_id == 0)  # devices may share slices
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size + 2**20)


def _shapes(state: Any) -> dict[str, list[Any]]:
    """Name of each leaf ("adapters/layers/attn/q/forward") -> its shape and dtype."""
    flat, _ = jax.tree.flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in flat
    }
