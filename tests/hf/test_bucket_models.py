"""Models and exports in a bucket, the commands on them, and what is said where a bucket cannot be
used. The stores are servers on loopback.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import pytest
from support.bucket import names
from support.checks import assert_trees_equal
from support.models import perturb, tiny_model

from zflora_jax.adapters.init import init_adapters
from zflora_jax.cli.main import main
from zflora_jax.core import storage
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.storage import as_path, file_system, put, put_file, remove
from zflora_jax.experiments.info import describe
from zflora_jax.hf import bucket as hf_bucket, save
from zflora_jax.hf.directory import local_copy
from zflora_jax.hf.load import load_model, model_config
from zflora_jax.hf.peft import load_peft, save_peft
from zflora_jax.hf.save import save_hf
from zflora_jax.hf.shards import Shards
from zflora_jax.reporting import plots
from zflora_jax.reporting.files import atomic_write


@pytest.fixture
def url(each_bucket: str, tmp_path, monkeypatch) -> str:
    """Where an export goes; copies of it go into a cache of the test's own."""
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "cache"))
    return f"{each_bucket}/export"


def files_at(url: str) -> set[str]:
    return {name.partition("export/")[2] for name in names(url)} - {hf_bucket.MARKER}


def copies() -> list[Path]:
    """What the cache holds, without locks; and nothing that is temporary."""
    assert not list(hf_bucket.cache_dir().glob(".*"))
    return [path for path in hf_bucket.cache_dir().glob("*/*") if path.name != hf_bucket.LOCK]


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """The names of the files that are downloaded whole."""
    names, fetch = [], hf_bucket._Objects.fetch
    monkeypatch.setattr(
        hf_bucket._Objects, "fetch", lambda self, *to: (names.append(to[0]), fetch(self, *to))[1]
    )
    return names


# --- exports --------------------------------------------------------------------------------------


def test_an_export_in_a_bucket_is_the_export_on_disk(url, model, tmp_path, monkeypatch, fetched):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # which may be too small
    reports = [save_hf(path, model) for path in (url, tmp_path / "export")]
    assert reports[0]["path"] == url
    assert {**reports[0], "path": ""} == {**reports[1], "path": ""}
    there = as_path(url)
    for name in reports[0]["files"]:
        assert (there / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
    assert files_at(url) == set(reports[0]["files"])
    loaded = load_model(url)
    assert_trees_equal(loaded.params, load_model(tmp_path / "export").params)
    assert loaded.source == url and model_config(url) == loaded.config
    [copy] = copies()
    fetched.clear()
    load_model(url)
    assert fetched == [] and copies() == [copy]


def test_what_is_copied_of_a_model():
    """All that loading reads, and no other form of the weights."""
    names = "zflora/restore.safetensors additional_chat_templates/rag.jinja config.json"
    assert all(map(hf_bucket._is_of_model, names.split()))
    others = "consolidated.safetensors original/consolidated.00.safetensors a/b.json x.bin"
    assert not any(map(hf_bucket._is_of_model, others.split()))


def test_the_newest_copy_of_an_export_is_kept(url, model, fetched, monkeypatch):
    """And an older one for a day: another process may be reading it."""
    other = tiny_model(num_layers=1)
    for saved in (other, model):
        save_hf(f"{url}-c", saved)
        load_model(f"{url}-c")
    assert len(copies()) == 2
    monkeypatch.setattr(hf_bucket, "KEPT", -1.0)
    save_hf(f"{url}-c", tiny_model(seed=3, num_layers=1))
    load_model(f"{url}-c")
    assert len(copies()) == 1
    for path, saved in ((url, other), (f"{url}-b", other), (url, model)):
        save_hf(path, saved)
        load_model(path)
    assert len(copies()) == 3  # of three exports
    remove(as_path(f"{url}-b"))
    save_hf(f"{url}-b", model)
    fetched.clear()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: local_copy(f"{url}-b"), range(4)):
            assert (found / "config.json").is_file()
    assert len(fetched) == len(set(fetched)) and len(copies()) == 3


def test_all_processes_hear_of_an_upload_that_failed(url, model, monkeypatch):
    heard = []

    def on_main(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError as error:
            heard.append(str(error))
            raise

    monkeypatch.setattr(save, "on_main", on_main)
    monkeypatch.setattr(hf_bucket, "put_file", Mock(side_effect=OSError("no route to the store")))
    with pytest.raises(OSError, match="no route"):
        save_hf(url, model)
    assert heard == ["no route to the store"]
    assert not hf_bucket.cache_dir().exists() or not copies()


def test_an_upload_that_was_stopped_is_no_export(url, model, monkeypatch):
    for layers in (1, 3):  # of nothing, then over an export
        done = []

        def stopped(file: Path, path: Path, done: list[Path] = done) -> None:
            if len(done) == 2:
                raise OSError("the process ends here")
            put_file(file, path)
            done.append(path)

        with monkeypatch.context() as patch:
            patch.setattr(hf_bucket, "put_file", stopped)
            with pytest.raises(OSError, match="ends here"):
                save_hf(url, tiny_model(num_layers=layers))
        with pytest.raises(CheckpointError, match=r"is not whole: its upload goes on, or was stop"):
            load_model(url)
        save_hf(url, model)  # over what is left there
        assert_trees_equal(load_model(url).params, model.params)


def test_an_export_replaces_what_an_export_wrote_and_nothing_else(url, model):
    save_hf(url, model, max_shard_bytes=20_000)
    assert "model.safetensors.index.json" in files_at(url)
    report = save_hf(url, model)
    assert files_at(url) == set(report["files"])
    put(as_path(url) / "notes.txt", b"mine")
    with pytest.raises(CheckpointError, match=r"did not write there: notes\.txt\. It is left"):
        save_hf(url, model)
    assert files_at(url) == {*report["files"], "notes.txt"}
    with pytest.raises(CheckpointError, match=r"config\.json is a file; give a directory"):
        save_hf(f"{url}/config.json", model)


def test_an_export_replaces_no_other_kind_of_thing(url, model):
    put(as_path(url) / "run/config.json", b"{}")
    with pytest.raises(CheckpointError, match=r"run exists and was not written by this project"):
        save_hf(f"{url}/run", model)
    adapter = AdapterConfig("lora", rank=4)
    adapters = init_adapters(jax.random.key(0), model, adapter)
    saves = {
        "lora": lambda to: save_peft(to, model, adapter, adapters),
        "full": lambda to: save_hf(to, model),
    }
    for name, write in saves.items():
        write(f"{url}/{name}")
    for name, other in (("lora", "full"), ("full", "lora")):
        with pytest.raises(CheckpointError, match="exists and was not written by this project"):
            saves[other](f"{url}/{name}")
        saves[name](f"{url}/{name}")


def test_a_damaged_object_is_refused(url, model):
    save_hf(url, model)
    weights = as_path(url) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    put(weights, bytes(content))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged, or changed while"):
        load_model(url)
    assert not copies()


def test_a_directory_copied_there_by_other_software(url, model_dir):
    for file in (file for file in model_dir.rglob("*") if file.is_file()):
        put(as_path(url) / file.relative_to(model_dir).as_posix(), file.read_bytes())
    put(as_path(url) / "original/params.json", b"{}")
    put(as_path(url) / "zflora/old/restore.safetensors", b"")
    assert_trees_equal(load_model(url).params, load_model(model_dir).params)
    [copy] = copies()
    assert not (copy / "original").exists() and not (copy / "zflora").exists()
    with pytest.raises(CheckpointError, match=r"no model at .*/nothing: there are no objects"):
        load_model(f"{url}/nothing")


def test_a_peft_directory(url):
    model, adapter = tiny_model(), AdapterConfig("lora", rank=4)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter))
    assert save_peft(url, model, adapter, adapters)["path"] == url
    assert_trees_equal(load_peft(url, model)[1], adapters)


def test_what_describes_a_model_reads_no_weights(url, model, tmp_path, fetched):
    for to in (url, tmp_path / "export"):
        save_hf(to, model, max_shard_bytes=20_000)
    facts = describe(url)
    assert facts == describe(tmp_path / "export") | {"path": url}
    assert "config.json" in fetched and not [n for n in fetched if n.endswith(".safetensors")]
    assert not copies()
    with hf_bucket.headers(as_path(url)) as folder:
        holes = Shards(folder)
        assert not any(holes.read(name).any() for name in holes.shapes)
    put(as_path(url) / "zflora.json", b"[]")
    with pytest.raises(CheckpointError, match=r"zflora\.json is damaged"):
        describe(url)


def test_a_local_copy_of_what_is_on_disk_is_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_copy("~/export") == tmp_path / "export"


# --- commands -------------------------------------------------------------------------------------


def test_the_commands_on_a_run_in_a_bucket(bucket, config_file, capsys):
    run, export = f"{bucket}/run", f"{bucket}/export"

    def said(*words: str) -> str:
        assert main(list(words)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert f"trained in {run}" in said("train", "--config", config_file, "--workdir", run)
    said("train", "--resume", "--workdir", run)
    assert f"written to {run}/eval" in said("eval", "--workdir", run)
    evaluated = [path.name for path in (as_path(run) / "eval").iterdir()]
    assert {"arithmetic-test-step2.json", "arithmetic-test-step2.jsonl"} <= set(evaluated)
    assert not [name for name in evaluated if "partial" in name]
    answer = said("generate", "--workdir", run, "--prompt", "1 + 1", "--max-new-tokens", "4")
    assert "max_abs_dlogit" in said("export", "--workdir", run, "--out", export)
    again = said("generate", "--model", export, "--prompt", "1 + 1", "--max-new-tokens", "4")
    assert answer == again
    assert "run" in said("info", run) and "export" in said("info", export)
    said("plot", run)
    assert (as_path(run) / "curves.svg").exists()


@pytest.mark.parametrize(
    ("other", "names", "title"),
    [
        ("{bucket}/all/b", ["a", "b"], "2 runs of all"),
        ("{disk}/b", ["{bucket}/all/a", "{disk}/b"], "2 runs"),
    ],
)
def test_runs_in_a_bucket_and_on_disk_are_drawn_together(
    bucket, tmp_path, monkeypatch, other, names, title
):
    told = {"bucket": bucket, "disk": str(tmp_path)}
    other, names = other.format(**told), [name.format(**told) for name in names]
    drawn = []
    monkeypatch.setattr(plots, "training_curves", lambda runs, *of: drawn.append((runs, of)))
    for folder in (f"{bucket}/all/a/", other):
        atomic_write(f"{folder}/metrics.jsonl", b"")
    assert main(["plot", f"{bucket}/all/a/", other, "--out", "both"]) == 0
    [(runs, of)] = drawn
    assert list(runs) == names and of == ("both", title)


# --- buckets that cannot be used ------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, bucket):
    """Nothing is known of a store yet; nor afterwards."""
    import s3fs

    monkeypatch.setattr(storage, "_reached", set())
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("bucket_name", "variables", "message"),
    [
        ("no-such-bucket", {}, r"there is no such bucket \(.*\)\. Make it, or correct the URL"),
        ("b", {"AWS_ACCESS_KEY_ID": None}, r"no credentials were found .* Set AWS_ACCESS_KEY_ID"),
        ("b", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, r"cannot be reached .*AWS_ENDPOINT_URL"),
    ],
)
def test_a_bucket_that_cannot_be_used(fresh, bucket_name, variables, message, capsys, monkeypatch):
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    waits = []
    monkeypatch.setattr(  # it waits for no time
        "botocore.retries.standard.ExponentialBackoff.delay_amount",
        lambda self, context: waits.append(context) or 0.0,
    )
    started = time.monotonic()
    assert main(["train", "--resume", "--workdir", f"s3://{bucket_name}/run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: cannot use s3://{bucket_name}: .*{message}", line)
    assert len(waits) < 10 and time.monotonic() - started < 60  # no endless retries


def test_a_missing_package_names_the_extra(fresh, monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    storage._check_installed.cache_clear()
    with pytest.raises(ConfigError, match=r"s3fs: pip install 'zflora-jax\[storage\]'"):
        as_path("s3://bucket/run")


def test_a_workdir_without_a_run(bucket, capsys):
    assert main(["eval", "--workdir", f"{bucket}/nothing"]) == 2
    assert "holds no run (no config.json in it)" in capsys.readouterr().err


def test_a_store_that_fails_later_ends_the_command(bucket, capsys, monkeypatch):
    from botocore.exceptions import EndpointConnectionError

    def gone(*_: object, **__: object) -> None:
        raise EndpointConnectionError(endpoint_url="http://store")

    as_path(f"{bucket}/run")
    monkeypatch.setattr(type(file_system("s3://b")), "exists", gone)
    assert main(["eval", "--workdir", f"{bucket}/run"]) == 2
    assert 'error: Could not connect to the endpoint URL: "http://store"' in capsys.readouterr().err
