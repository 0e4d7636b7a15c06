"""What a store's failures, and several processes, do to a run in a bucket: nothing is lost, nobody
waits, and the message says what to do. The stores are servers on loopback.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import pytest
from botocore.exceptions import EndpointConnectionError

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path, put, remove
from zflora_jax.evaluation.records import _in_batches
from zflora_jax.experiments import export
from zflora_jax.reporting import growing, metrics
from zflora_jax.reporting.metrics import MetricWriter
from zflora_jax.training import checkpoint_files
from zflora_jax.training.checkpoint import Checkpoints, SaveError
from zflora_jax.training.trainer import TrainState
from zflora_jax.training.workdir import COMMIT, saved_steps


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/runs/a"


def state_of(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"a": jnp.full((3, 2), step, jnp.float32)}, ())


# --- checkpoints ----------------------------------------------------------------------------------


class Client:
    """JAX's coordination service as process 0 of two sees it."""

    def __init__(self) -> None:
        self.sent: set[str] = set()
        self.blocked = 0.0  # minutes

    def wait_at_barrier(self, *_: object) -> None:
        pass

    def key_value_set(self, key: str, _: str) -> None:
        self.sent.add(key)

    def blocking_key_value_get(self, key: str, milliseconds: int) -> None:
        if key not in self.sent:
            self.blocked += milliseconds / 60_000
            raise TimeoutError


def test_after_a_save_that_failed_nothing_is_waited_for(url, monkeypatch):
    refuse = [False]

    def lost() -> None:
        if refuse[0]:
            raise OSError("taken over")

    jax.devices()  # made before there is a service, which they would join
    client = Client()
    monkeypatch.setattr("jax._src.distributed.global_state.client", client)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SaveError, match="taken over"), Checkpoints(url, before_commit=lost) as it:
        for step in (1, 2):
            it._files.write(step, {}, {}, None)  # without arrays, which would be of two processes
            with it._writing():
                it._files.wait()
            refuse[0] = True
    assert client.blocked == 0 and len(client.sent) == 1
    assert saved_steps(url) == [1]


def test_an_outage_is_no_reason_to_remove_a_checkpoint(url, monkeypatch):
    with Checkpoints(url, max_to_keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {})
    with Checkpoints(url) as checkpoints:
        real = checkpoint_files._store_settings
        down = {"endpoint": "http://127.0.0.1:1", "s3_request_retries": {"max_retries": 1}}
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files, "_store_settings", lambda folder: real(folder) | down)
            said = r"2 cannot be read \(.*If the store or the network failed, run the same command"
            with pytest.raises(ConfigError, match=f"{said} again: nothing is lost"):
                checkpoints.restore(state_of(0))
        remove(as_path(url) / "checkpoints/2/state/1/adapters/a/.zarray")
        with pytest.raises(
            ConfigError, match=r"\(\w+: NOT_FOUND.*\)\. Remove that folder to go on"
        ):
            checkpoints.restore(state_of(0))
        remove(as_path(url) / "checkpoints/2" / COMMIT)
        with pytest.raises(ConfigError, match=r"FileNotFoundError.*\)\. Remove that folder to go"):
            checkpoints.restore(state_of(0))


def test_a_reader_beside_a_run_that_goes_on(url):
    with Checkpoints(url, max_to_keep=2) as run:
        for step, loss in ((1, 1.0), (2, 2.0)):
            run.save(step, state_of(step), {}, loss)
    with Checkpoints(url, create=False) as reader:
        assert (reader.latest, reader.best) == (2, 1)
        with Checkpoints(url, max_to_keep=2) as run:
            run.save(3, state_of(3), {}, 3.0)
        assert (reader.latest, reader.best) == (3, 2)
        assert int(reader.restore(state_of(0), 3)[0].step) == 3
        listed = reader._files.steps()
        remove(as_path(url) / "checkpoints/2" / COMMIT)
        reader._files.steps = lambda: listed  # gone since it was listed
        assert reader.best == 3


def test_old_steps_that_cannot_be_removed_are_a_warning(url, monkeypatch, caplog):
    def refuse(path: Path) -> None:
        raise OSError("not now")

    with monkeypatch.context() as patch, Checkpoints(url) as checkpoints:
        checkpoints.save(1, state_of(1), {})
        patch.setattr(checkpoint_files, "remove", refuse)
        checkpoints.save(2, state_of(2), {})
    assert "the old checkpoint" in caplog.text and "could not be removed: not now" in caplog.text
    assert saved_steps(url) == [1, 2]
    with Checkpoints(url) as checkpoints:
        checkpoints.save(3, state_of(3), {})
    assert saved_steps(url) == [3]


# --- what trackers write --------------------------------------------------------------------------


def test_what_trackers_write_when_they_are_closed_is_uploaded(url, monkeypatch):
    class Tracker:
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def write(self, *_: object) -> None:
            pass

        def close(self) -> None:
            (self.folder / "events").write_text("last")

    monkeypatch.setattr(metrics, "make_trackers", lambda names, folder, *_: [Tracker(folder)])
    with MetricWriter(url, 9, console=False) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.sync()  # with this nothing new is in metrics.jsonl
    assert (as_path(url) / "events").read_text() == "last"


# --- answers of an evaluation ---------------------------------------------------------------------


@pytest.mark.parametrize("lasting", [False, True])
def test_answers_that_cannot_be_uploaded_end_an_evaluation_at_its_end(
    url, model, monkeypatch, caplog, lasting
):
    partial, answered = as_path(url) / "x.partial.jsonl", []

    def answer(rows: list[int]) -> list[dict[str, int]]:
        monkeypatch.setattr(growing, "put", refuse if lasting or len(rows) == 2 else put)
        answered.extend(rows)
        return [{"output": row} for row in rows]

    def refuse(*_: object) -> None:
        raise EndpointConnectionError(endpoint_url="http://store")

    monkeypatch.setattr(growing, "UPLOAD_EVERY", 0.0)
    settings = (model, [[1], [2], [3]], "settings", 2, partial, lambda _: None)
    said = "the answers so far could not be uploaded: Could not connect"
    if lasting:
        with pytest.raises(OSError, match=said):
            _in_batches(answer, *settings)
    else:
        assert _in_batches(answer, *settings) == [{"output": row} for row in range(3)]
        assert _in_batches(Mock(side_effect=AssertionError), *settings)[2] == {"output": 2}
    assert said in caplog.text and answered == [0, 1, 2]


# --- exports --------------------------------------------------------------------------------------


def test_processes_export_to_the_top_of_a_bucket(bucket, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(export, "require_shared", lambda folder, name: asked.append(folder))
    monkeypatch.setattr(export, "load_run", lambda *_, **__: 1 / 0)  # the checks are passed
    for out in (f"{bucket}/export", tmp_path / "export"):
        with pytest.raises(ZeroDivisionError):
            export.export_run("run", out)
    assert asked == [tmp_path]
