"""Paths, files and folders in buckets, and the message where a bucket cannot be used. The stores
are servers on loopback.
"""

import os
import re
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from botocore.exceptions import EndpointConnectionError

from zflora_jax import ConfigError, atomic_write
from zflora_jax.cli.main import main
from zflora_jax.core import storage
from zflora_jax.core.storage import Mirror, as_path, file_system, local_copy, objects, put, remove
from zflora_jax.reporting import metrics
from zflora_jax.reporting.metrics import MetricWriter, read_metrics


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A local cache of the test's own; nothing temporary is left there."""
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    assert not (tmp_path / "cache").exists() or not os.listdir(tmp_path / "cache")


@pytest.fixture
def folder(each_bucket: str) -> Path:
    return as_path(f"{each_bucket}/runs/a")


REFUSED = Mock(side_effect=EndpointConnectionError(endpoint_url="http://store"))


# --- files ----------------------------------------------------------------------------------------


def test_paths_of_objects_are_those_of_files(folder):
    file = as_path(Path(str(folder))) / "folder" / "file.txt"  # a Path makes one slash of two
    file.parent.mkdir(parents=True)
    atomic_write(file, "ä".encode())
    same = (file.resolve(), file.absolute(), file.expanduser())
    assert {str(file), *map(str, same)} == {f"{folder}/folder/file.txt"}
    assert file.read_text(encoding="utf-8") == "ä" and file.read_bytes() == "ä".encode()
    assert file.is_file() and file.parent.is_dir() and not (file.parent / "other").exists()
    assert [path.name for path in file.parent.glob("*.txt")] == ["file.txt"]
    with local_copy(file.parent, ["file.txt"]) as copy:
        assert (copy / "file.txt").read_bytes() == "ä".encode() and isinstance(copy, Path)
    with pytest.raises(FileNotFoundError):
        (file.parent / "other").read_text()
    file.unlink()
    assert not file.exists() and not file.parent.is_dir()


def test_removing_and_listing_end_at_a_folder(folder):
    for name in ("2/a", "2/b/c", "20/a", "2.json"):
        put(folder / name, name.encode())
    assert sorted(objects(folder / "2")) == ["a", "b/c"]
    for _ in range(2):  # the second finds nothing
        remove(folder / "2")
    assert sorted(objects(folder)) == ["2.json", "20/a"]
    remove(folder / "2.json")
    assert sorted(objects(folder)) == ["20/a"]


def test_a_file_is_replaced_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    for file in (folder / "x.txt", tmp_path / "new" / "x.txt"):
        atomic_write(file, b"old\r")  # bytes that a store could take for an end of line
        with pytest.raises(ZeroDivisionError), storage.whole_file(file) as temporary:
            temporary.write_bytes(b"half")
            _ = 1 / 0
        assert file.read_bytes() == b"old\r" and len(list(file.parent.iterdir())) == 1
    monkeypatch.setattr(storage, "put_file", REFUSED)
    with pytest.raises(EndpointConnectionError):
        atomic_write(folder / "x.txt", b"new")
    assert (folder / "x.txt").read_bytes() == b"old\r"


# --- folders that are uploaded --------------------------------------------------------------------


def test_a_mirror_uploads_the_files_that_have_changed(folder, tmp_path, monkeypatch):
    put(folder / "id", b"7")
    mirror = Mirror(folder, ("id", "missing"))
    assert (mirror.path / "id").read_bytes() == b"7" and not (mirror.path / "missing").exists()
    (mirror.path / "deep").mkdir()
    for content in ("one", "one\ntwo"):
        (mirror.path / "deep" / "log").write_text(content)
        assert not mirror.sync() and (folder / "deep/log").read_text() == content
    monkeypatch.setattr(storage, "put_file", Mock(side_effect=AssertionError))
    mirror.sync()  # nothing has changed
    mirror.close()
    local = Mirror(tmp_path / "run")
    local.sync()
    local.close()
    assert local.path == tmp_path / "run" and local.path.is_dir()


def test_metrics_are_uploaded_at_saves_and_at_the_end(folder, monkeypatch, caplog):
    class Tracker:
        def __init__(self, folder: Path, *_: object) -> None:
            self.folder = folder

        def write(self, *_: object) -> None:
            pass

        def close(self) -> None:
            (self.folder / "events").write_text("last")

    monkeypatch.setattr(metrics, "TRACKERS", {"tensorboard": Tracker})
    path, lost = folder / "metrics.jsonl", Mock(side_effect=[OSError("taken over")] * 2)
    writer = MetricWriter(folder, 9, console=False, before_upload=lost)
    with writer, pytest.raises(OSError, match="taken over"):
        writer.sync()
    assert not objects(folder)  # by a run that lost its lock
    with MetricWriter(folder, 9, console=False) as writer:
        writer.write(1, "train", {"loss": 1.0})
        assert not path.exists()
        writer.sync()
        writer.write(2, "train", {"loss": 2.0})
        assert [r["step"] for r in read_metrics(path)] == [1]
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    assert (folder / "events").read_text() == "last"
    caplog.clear()
    monkeypatch.setattr(storage, "put_file", REFUSED)
    with MetricWriter(folder, 9, console=False, start_step=1) as writer:
        with pytest.raises(OSError, match=r"\.jsonl could not be uploaded: Could not connect"):
            writer.sync()
        assert not caplog.records
    assert "could not be uploaded: Could not connect" in caplog.text


# --- buckets that cannot be used ------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, bucket):
    """No store was used yet; nor afterwards."""
    import s3fs

    monkeypatch.setattr(storage, "_reached", set())
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("no-such-bucket", {}, r"\(FileNotFoundError: .*\)\. Make this bucket, or correct the URL"),
        ("b", {"AWS_ACCESS_KEY_ID": ""}, r"\(NoCredentialsError: .*AWS_ACCESS_KEY_ID"),
        ("b", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, r"Could not connect .*AWS_ENDPOINT_URL"),
    ],
)
def test_a_bucket_that_cannot_be_used(fresh, name, variables, message, capsys, monkeypatch):
    for variable, value in variables.items():
        if value:
            monkeypatch.setenv(variable, value)
        else:
            monkeypatch.delenv(variable)
    waits = Mock(return_value=0.0)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", waits)
    started = time.monotonic()
    assert main(["train", "--resume", "--workdir", f"s3://{name}/run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: cannot use s3://{name} .*{message}", line)
    assert waits.call_count < 10 and time.monotonic() - started < 60  # no endless retries


def test_a_missing_package_names_the_extra(fresh, monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    storage._check_installed.cache_clear()
    with pytest.raises(ConfigError, match="s3fs: pip install s3fs"):
        as_path("s3://bucket/run")


def test_a_store_that_fails_later_ends_the_command(bucket, capsys, monkeypatch):
    assert main(["eval", "--workdir", f"{bucket}/nothing"]) == 2
    assert "holds no run (no config.json in it)" in capsys.readouterr().err
    monkeypatch.setattr(type(file_system("s3://b")), "exists", REFUSED)
    assert main(["eval", "--workdir", f"{bucket}/run"]) == 2
    assert 'error: Could not connect to the endpoint URL: "http://store"' in capsys.readouterr().err
