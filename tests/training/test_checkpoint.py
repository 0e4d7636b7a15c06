"""Checkpoints, on disk and in buckets: what is saved comes back, the right ones are kept, damage is
named with its remedy. The stores are servers on loopback.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.bucket import new_bucket, use_store
from support.grids import always
from support.runs import quiet_train

from zflora_jax import ConfigError, Preempted, atomic_write, load_run, make_mesh, override
from zflora_jax.core.run_config import MeshConfig
from zflora_jax.core.storage import as_path, objects, remove
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.training import checkpoint as checkpoint_module
from zflora_jax.training.checkpoint import Checkpoints, SaveError
from zflora_jax.training.trainer import TrainState
from zflora_jax.training.workdir import META, saved_steps


@pytest.fixture(params=always(["disk", "s3", "gs"], "gs".__ne__))
def place(request, tmp_path) -> Path:
    """A workdir on disk, and in a bucket of each type of store."""
    if request.param == "disk":
        return tmp_path / "run"
    patch, store = map(request.getfixturevalue, ("monkeypatch", request.param))
    use_store(patch, request.param, store)
    return as_path(f"{new_bucket(request.param)}/run")


def state_of(step: int) -> TrainState:
    half = jnp.arange(4, dtype=jnp.bfloat16) + jnp.bfloat16(step)
    adapters = {"a": jnp.full((3, 2), step, jnp.float32), "b": half}
    return TrainState(jnp.int32(step), adapters, (jnp.float32(0.1 * step), jnp.bool_(True)))


def save(place: Path, losses: dict[int, float | None], **settings: Any) -> None:
    with Checkpoints(place, **settings) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state_of(step), {"next_step": step}, loss)


# --- the files ------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_and_the_newest_and_the_best_stay(place):
    for losses in ({1: 3.0, 2: 1.0, 3: 2.0}, {4: 5.0}):  # by two processes
        save(place, losses, max_to_keep=1, keep_best=True)
        assert saved_steps(place) == [2, max(losses)]
    folders = {path.name for path in (place / "checkpoints").iterdir()}
    assert folders == {"2", "4"}
    with Checkpoints(place, create=False) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (4, 2)
        state, meta = checkpoints.restore(state_of(0), 2)
        assert meta["next_step"] == 2 and meta["loss"] == 1.0
        jax.tree.map(np.testing.assert_array_equal, state, state_of(2))
        for other in (jnp.zeros(2), jnp.zeros((), jnp.bfloat16)):
            wrong = state_of(0).replace(opt_state=(other, jnp.bool_(True)))
            with pytest.raises(ConfigError, match=r"4 cannot be read .*other names, shapes or dty"):
                checkpoints.restore(wrong)
        with pytest.raises(ConfigError, match="has no checkpoint of step 3; it has those of 2, 4"):
            checkpoints.restore(state_of(0), 3)


def test_a_state_comes_back_on_another_mesh(tmp_path):
    """Each slice is stored once."""
    axes = jax.sharding.PartitionSpec("fsdp", "tensor")
    meshes = [make_mesh(MeshConfig(*sizes)) for sizes in ((2, 2, 2), (1, 4, 1), (1, 1, 8))]
    whole = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
    put_on = [jax.device_put(whole, jax.sharding.NamedSharding(mesh, axes)) for mesh in meshes]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": put_on[0]}, {})
    sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(sizes) < 1.2 * whole.nbytes
    with Checkpoints(tmp_path, create=False) as checkpoints:
        for like in (*put_on, jax.ShapeDtypeStruct(whole.shape, whole.dtype)):
            found = checkpoints.restore({"a": like})[0]["a"]
            np.testing.assert_array_equal(found, whole)
            assert like.sharding is None or found.sharding == like.sharding


DAMAGE = {
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


STATE = "state/manifest.ocdbt"


@pytest.mark.parametrize(
    ("place", "name", "how"),
    [
        *(("disk", STATE, how) for how in ("lost", *DAMAGE)),
        *(("disk", META, how) for how in ("cut", "emptied")),
        *(("s3", STATE, "flipped"), ("gs", STATE, "lost"), ("gs", META, "cut")),
    ],
    indirect=["place"],
)
def test_a_damaged_checkpoint_names_the_remedy(place, name, how):
    save(place, {1: None, 2: None}, max_to_keep=2)
    file = place / "checkpoints" / "2" / name
    atomic_write(file, DAMAGE[how](file.read_bytes())) if how in DAMAGE else file.unlink()
    with Checkpoints(place) as checkpoints:
        with pytest.raises(ConfigError, match=r"2 cannot be read \(.*resume from step 1\.$"):
            checkpoints.restore(state_of(0))
        jax.tree.map(
            np.testing.assert_array_equal, checkpoints.restore(state_of(0), 1)[0], state_of(1)
        )
    remove(place / "checkpoints" / "1")
    with (
        Checkpoints(place, create=False) as checkpoints,
        pytest.raises(ConfigError, match=r"run the same command again: .*start the run again"),
    ):
        checkpoints.restore(state_of(0))


def test_a_step_without_its_meta_does_not_count_and_is_removed(place):
    save(place, {1: None, 2: None}, max_to_keep=2)
    (place / "checkpoints" / "2" / META).unlink()
    assert saved_steps(place) == [1]
    with Checkpoints(place, create=False):  # a reader removes nothing
        assert (place / "checkpoints" / "2").is_dir()
    with Checkpoints(place) as checkpoints:
        assert checkpoints.latest == 1 and not (place / "checkpoints" / "2").exists()


def test_a_reader_beside_a_run_that_goes_on(place, monkeypatch):
    save(place, {1: 1.0, 2: 2.0}, max_to_keep=2)
    with Checkpoints(place, create=False) as reader:
        assert (reader.latest, reader.best) == (2, 1)
        save(place, {3: 3.0}, max_to_keep=2)
        assert (reader.latest, reader.best) == (3, 2)
        assert int(reader.restore(state_of(0), 3)[0].step) == 3
        monkeypatch.setattr(checkpoint_module, "saved_steps", lambda _: [1, 2, 3])
        assert reader.best == 2  # step 1 has gone since it was listed


# --- failures of a save ---------------------------------------------------------------------------


def test_a_write_that_fails_keeps_the_checkpoints_before_it(place, monkeypatch, tmp_path):
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "cache"))
    save(place, {1: None})
    full = Mock(side_effect=OSError(28, "No space left on device"))
    said = r"could not be written to .*No space left on device.*before it are whole: free some spa"
    for function in ("require_room", "checksums", "write_json"):  # before, in and after a write
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module, function, full)
            with pytest.raises(SaveError, match=said), Checkpoints(place) as checkpoints:
                checkpoints.save(2, state_of(2), {})
            with pytest.raises(SaveError, match=said), Checkpoints(place) as checkpoints:
                checkpoints.save(2, state_of(2), {})
                checkpoints.save(3, state_of(3), {})  # waits for the one before
        assert saved_steps(place) == [1]
    with monkeypatch.context() as patch:  # the others must not wait for a process that failed
        patch.setattr(checkpoint_module, "gather_bytes", lambda own: [own, b"OSError: no room"])
        with pytest.raises(SaveError, match="in another process: OSError: no room") as held:
            save(place, {2: None})
    assert held and not [*(tmp_path / "cache").glob("*")]  # no temporary copy
    lost = Mock(side_effect=OSError("taken over"))
    with pytest.raises(SaveError, match=r"could not be written to .*taken over"):
        save(place, {2: None}, before_commit=lost)
    assert saved_steps(place) == [1]
    save(place, {2: None})
    assert saved_steps(place) == [2]


def test_old_steps_that_cannot_be_removed_are_a_warning(place, monkeypatch, caplog):
    with monkeypatch.context() as patch, Checkpoints(place) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        patch.setattr(checkpoint_module, "remove", Mock(side_effect=OSError("not now")))
        checkpoints.save(2, state_of(2), {})
    assert "the old checkpoint" in caplog.text and "could not be removed: not now" in caplog.text
    assert saved_steps(place) == [1, 2]
    save(place, {3: None})
    assert saved_steps(place) == [3]


@pytest.mark.parametrize("process", [0, 1])
def test_several_processes_write_before_a_checkpoint_counts(bucket, monkeypatch, process):
    """Into a bucket: process 0 uploads last, so files of both processes are as it has them."""
    place, there = as_path(f"{bucket}/run"), []

    def gather(own: bytes) -> list[bytes]:
        if own[:1] != b"{":  # the text of a failure here, or none
            return [own, b""]
        there.extend(objects(place))
        others = json.dumps({"both": f"of {1 - process}", "other": "theirs"}).encode()
        return [own, others][:: 1 - 2 * process]

    monkeypatch.setattr(checkpoint_module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint_module, "is_main", lambda: process == 0)
    monkeypatch.setattr(checkpoint_module, "on_main", lambda action: process or action())
    monkeypatch.setattr(checkpoint_module, "from_process_0", lambda value: value)
    monkeypatch.setattr(checkpoint_module, "gather_bytes", gather)
    orbax = Mock(save=lambda folder, *_, **__: atomic_write(folder / "both", b"slices"))
    monkeypatch.setattr(checkpoint_module, "_checkpointer", lambda _: orbax)
    with Checkpoints(place) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        uploaded = ["checkpoints/1/state/both"]
        assert there == (uploaded if process else []) and uploaded[0] in objects(place)
        assert saved_steps(place) == ([] if process else [1])  # without waiting
        if process == 0:
            found = json.loads((place / "checkpoints/1/meta.json").read_text())["files"]
            assert found == {"both": sha256(b"slices").hexdigest(), "other": "theirs"}
        orbax.wait_until_finished.side_effect = OSError("full")
        with pytest.raises(SaveError, match="full"):
            checkpoints.save(2, state_of(2), {})
        assert 2 not in saved_steps(place)


def test_saved_is_the_state_of_its_step(tmp_path):
    """Whatever is written into its buffers, which a step donates, while the copy is written."""
    state = TrainState(jnp.int32(1), {"a": jnp.ones((2**12, 2**12))}, ())
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 7, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        after = jax.block_until_ready(overwrite(state))
    with Checkpoints(tmp_path, create=False) as checkpoints:
        found, _ = checkpoints.restore(after)
    assert int(found.step) == 1 and (np.asarray(found.adapters["a"]) == 1).all()


# --- a run's checkpoints --------------------------------------------------------------------------


def test_a_step_is_saved_before_it_is_evaluated(run, tmp_path, monkeypatch):
    """Evaluation may take long, and cannot be interrupted."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop = Mock(side_effect=KeyboardInterrupt)
        patch.setattr("zflora_jax.experiments.setup.held_out_loss", stop)
        quiet_train(override(run, {"train.save_every": None}), tmp_path)
    assert quiet_train(run, tmp_path).report["resumed_from"] == run.train.steps
    with pytest.raises(ConfigError, match=r"has no best checkpoint: train with train.keep_best=T"):
        load_run(tmp_path, "best")
    with pytest.raises(ConfigError, match="expected a number of steps, or 'best'"):
        load_run(tmp_path, "newest")


@pytest.mark.soak  # a long run; choices are above
def test_the_best_checkpoint_of_a_run(run, tmp_path, monkeypatch):
    best = {"train.keep_best": True, "train.eval_every": 2, "eval.split": "validation"}
    run = override(run, best | {"train.steps": 12, "train.max_to_keep": 1})
    losses = iter([3.0, 2.0, 1.0, 2.0, 1.5, 1.2])
    monkeypatch.setattr(
        "zflora_jax.experiments.setup.held_out_loss",
        lambda *_, **__: {"loss": next(losses), "tokens": 1.0, "rows": 1.0},
    )
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: step == 9)
    with pytest.raises(Preempted):  # another process goes on with it
        quiet_train(run, tmp_path)
    monkeypatch.setattr(StopSignals, "requested", lambda self, step: False)
    quiet_train(run, tmp_path)
    assert saved_steps(tmp_path) == [6, 12]
    assert [load_run(tmp_path, step)[3] for step in (None, "best", "6")] == [12, 6, 6]
