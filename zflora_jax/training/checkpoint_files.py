"""How checkpoints lie in a workdir: on disk as orbax writes them, in a bucket as arrays under a
marker.

On disk: <step>/ (one item "state", one item "meta"); orbax writes it under another name and renames
it. orbax 0.12 takes no s3:// and a bucket has no rename, so in a bucket: <step>/state/<leaf> (zarr,
written by JAX through tensorstore, each process its own shards), and last <step>/commit.json. A
step without its commit.json is none. Both forms keep the newest checkpoints and, if asked, the
one of the lowest loss.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax

from zflora_jax.core.storage import file_system, is_store_error, put, remove
from zflora_jax.training.workdir import COMMIT, committed_steps

log = logging.getLogger(__name__)

Meta = dict[str, Any]

# orbax numbers its saves by a counter of the process, and what a save starts reads "the current
# one": two that begin together wait for each other's directories, or write before their own are
# there.
_SAVING = threading.Lock()


class DamagedError(ValueError):
    """What is read is not what was saved."""


class CheckpointFiles(Protocol):
    """Reads and writes the checkpoints of one run. A write goes on after `write` has returned."""

    def steps(self) -> list[int]: ...
    def write(self, step: int, state: Any, meta: Meta, loss: float | None) -> None: ...
    def wait(self) -> None: ...
    def read(self, step: int, like: Any) -> tuple[Any, Meta]: ...
    def read_meta(self, step: int) -> Meta: ...
    def close(self) -> None: ...


class OnDisk:
    """Checkpoints in a directory, by orbax.

    Args:
      folder: of the checkpoints.
      max_to_keep, keep_best, create: as of `checkpoint.Checkpoints`.
    """

    def __init__(self, folder: Path, max_to_keep: int, keep_best: bool, create: bool) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        policies: list[Any] = [LatestN(max_to_keep)]
        best: dict[str, Any] = {}
        if keep_best:
            by_loss = lambda metrics: metrics["loss"]  # noqa: E731
            policies.append(
                BestN(
                    get_metric_fn=by_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
                )
            )
            # Without best_fn orbax forgets the losses when the process ends.
            best = {"best_fn": by_loss, "best_mode": "min"}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            create=create,
            cleanup_tmp_directories=create,
            **best,
        )
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def write(self, step: int, state: Any, meta: Meta, loss: float | None) -> None:
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), meta=self._ocp.args.JsonSave(meta)
        )
        with _SAVING:
            self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss})

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def read(self, step: int, like: Any) -> tuple[Any, Meta]:
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(like), meta=self._ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=args)
        return found["state"], found["meta"]

    def read_meta(self, step: int) -> Meta:
        only_meta = self._ocp.args.Composite(meta=self._ocp.args.JsonRestore())
        found: Meta = self._manager.restore(step, args=only_meta)["meta"]
        return found

    def close(self) -> None:
        self._manager.close()


class InBucket:
    """Checkpoints under a URL, by JAX's array serialization.

    Args:
      folder: of the checkpoints.
      max_to_keep, keep_best, create: as of `checkpoint.Checkpoints`.
      before_commit: called in process 0 before a checkpoint counts; what it raises prevents that.
    """

    def __init__(
        self,
        folder: Path,
        max_to_keep: int,
        keep_best: bool,
        create: bool,
        before_commit: Callable[[], None],
    ) -> None:
        self._folder, self._max_to_keep, self._keep_best = folder, max_to_keep, keep_best
        self._before_commit, self._create = before_commit, create
        self._manager = _manager()
        # step -> its loss, of all that count and the one that is being written
        self._losses: dict[int, float | None] = {}
        if create:
            self._losses = {
                step: self.read_meta(step).get("loss") for step in committed_steps(folder)
            }
            if jax.process_index() == 0:
                self._clean_up()

    def steps(self) -> list[int]:
        # Beside a reader the run may go on, and save and remove steps.
        return sorted(self._losses) if self._create else committed_steps(self._folder)

    def write(self, step: int, state: Any, meta: Meta, loss: float | None) -> None:
        leaves = _named(state)
        shapes = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}
        content = json.dumps({"meta": meta, "state": shapes}).encode()
        self._losses[step] = loss
        dropped = self._dropped()
        for old in dropped:
            del self._losses[old]

        def commit() -> None:
            self._before_commit()
            put(self._folder / str(step) / COMMIT, content)
            self._delete(dropped)

        # In a thread: a notebook runs an event loop in its own, and this runs another.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(
                self._manager.serialize,
                list(leaves.values()),
                [self._spec(step, name) for name in leaves],
                on_commit_callback=commit,
            ).result()

    def wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except BaseException:
            # At its next wait, that of a failed save waits half an hour for what nobody sends.
            self._manager = _manager()
            raise

    def read(self, step: int, like: Any) -> tuple[Any, Meta]:
        leaves, content = _named(like), self._content(step)
        shapes = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}
        if content["state"] != shapes:
            raise DamagedError("its state has other names, shapes or dtypes")
        with ThreadPoolExecutor(1) as thread:
            arrays = thread.submit(
                self._manager.deserialize,
                [leaf.sharding for leaf in leaves.values()],
                [self._spec(step, name) for name in leaves],
                dtypes=[leaf.dtype for leaf in leaves.values()],
            ).result()
        return jax.tree.unflatten(jax.tree.structure(like), arrays), content["meta"]

    def read_meta(self, step: int) -> Meta:
        meta: Meta = self._content(step)["meta"]
        return meta

    def close(self) -> None:
        pass

    def _content(self, step: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self._folder / str(step) / COMMIT).read_text(encoding="utf-8")
        )
        return found

    def _spec(self, step: int, name: str) -> dict[str, Any]:
        from jax.experimental.array_serialization.serialization import get_tensorstore_spec

        spec: dict[str, Any] = get_tensorstore_spec(f"{self._folder}/{step}/state/{name}")
        spec["kvstore"] |= _store_settings(self._folder)
        return spec

    def _dropped(self) -> list[int]:
        """The steps that do not stay beside those that do."""
        keep = set(self.steps()[-self._max_to_keep :])
        scored = [(loss, step) for step, loss in self._losses.items() if loss is not None]
        if self._keep_best and scored:
            keep.add(min(scored)[1])
        return [step for step in self.steps() if step not in keep]

    def _delete(self, steps: Sequence[int]) -> None:
        """Remove steps. One that stays is removed later: the new step is there all the same."""
        for folder in (self._folder / str(step) for step in steps):
            try:
                remove(folder / COMMIT)  # first: then the rest counts for nothing
                remove(folder)
            except Exception as error:
                if not isinstance(error, OSError) and not is_store_error(error):
                    raise
                log.warning("the old checkpoint %s could not be removed: %s", folder, error)

    def _clean_up(self) -> None:
        """Remove the steps that killed processes left without a marker."""
        store = file_system(self._folder)
        try:
            there = store.ls(os.fspath(self._folder), detail=False)
        except FileNotFoundError:
            return
        for name in (path.rstrip("/").rpartition("/")[2] for path in there):
            if name.isdigit() and int(name) not in self._losses:
                remove(self._folder / name)


def _manager() -> Any:
    from jax.experimental.array_serialization.serialization import GlobalAsyncCheckpointManager

    return GlobalAsyncCheckpointManager(timeout_secs=1800)


def _named(state: Any) -> dict[str, Any]:
    """The leaves of a state by their names, which are keys of objects: 1/adapters/layers/q."""
    flat, _ = jax.tree.flatten_with_path(state)
    found = {}
    for i, (path, leaf) in enumerate(flat):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[f"{i}/" + re.sub(r"[^\w/.-]", "_", name)] = leaf
    return found


def _store_settings(folder: Path) -> dict[str, Any]:
    """What tensorstore is told beside bucket and path. Its own search for the endpoint and for
    credentials knows less than that of fsspec's libraries.
    """
    retries = {"max_retries": 6, "initial_delay": "500ms", "max_delay": "8s"}
    if os.fspath(folder).startswith("gs://"):
        return {"gcs_request_retries": retries}
    store = file_system(folder)
    store.connect()
    endpoint, region = store.s3.meta.endpoint_url, store.s3.meta.region_name
    settings: dict[str, Any] = {"s3_request_retries": retries}
    if ".amazonaws.com" not in endpoint:
        settings |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else it warns of every place where it found none
        settings["aws_credentials"] = {"type": "environment"}
    return settings
