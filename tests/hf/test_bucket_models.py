"""Models and exports in a bucket, and the commands on them. The stores are servers on loopback."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest
from support.bucket import names
from support.checks import assert_trees_equal
from support.models import perturb, tiny_model

from zflora_jax import AdapterConfig, CheckpointError, load_peft, save_hf, save_peft
from zflora_jax.adapters.init import init_adapters
from zflora_jax.cli.main import main
from zflora_jax.core.storage import as_path, objects, put, put_file
from zflora_jax.hf import directory
from zflora_jax.hf.directory import local_copy
from zflora_jax.hf.load import load_model, model_config


@pytest.fixture
def url(each_bucket: str, tmp_path, monkeypatch) -> str:
    """Where an export goes; copies of it go into a cache of the test's own."""
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "cache"))
    return f"{each_bucket}/export"


def files_at(url: str) -> set[str]:
    return {name.partition("export/")[2] for name in names(url)} - {directory.MARKER}


def copies(tmp_path: Path) -> list[Path]:
    """The copies in the cache; nothing temporary is left there."""
    assert not list((tmp_path / "cache").glob(".*"))
    return list((tmp_path / "cache" / "models").glob("*"))


@pytest.fixture
def fetched(monkeypatch) -> Mock:
    """Notes the files that are downloaded."""
    monkeypatch.setattr(directory, "_fetch", found := Mock(wraps=directory._fetch))
    return found


def test_an_export_in_a_bucket_is_the_export_on_disk(url, model, tmp_path, monkeypatch, fetched):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # which may be too small
    reports = [save_hf(to, model, max_shard_bytes=20_000) for to in (url, tmp_path / "export")]
    assert reports[0]["path"] == url
    assert {**reports[0], "path": ""} == {**reports[1], "path": ""}
    for name in reports[0]["files"]:
        assert (as_path(url) / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
    assert files_at(url) == set(reports[0]["files"])
    config = model_config(url)  # which copies no weights
    assert not [c for c in fetched.call_args_list if c.args[0].suffix == ".safetensors"]
    loaded = load_model(url)
    assert_trees_equal(loaded.params, load_model(tmp_path / "export").params)
    assert loaded.source == url and config == loaded.config
    fetched.reset_mock()
    load_model(url)
    assert not fetched.called
    report = save_hf(url, model)
    assert files_at(url) == set(report["files"])  # the shards are removed
    put(as_path(url) / "zflora.json", b"[]")
    with pytest.raises(CheckpointError, match=r"zflora\.json is damaged"):
        model_config(url)


def test_the_newest_copy_of_an_export_is_kept(url, model, tmp_path, monkeypatch):
    """And an older one for a day: another process may be reading it."""
    for count, kept in ((1, 3600.0), (2, 3600.0), (1, -1.0)):
        monkeypatch.setattr(directory, "KEPT", kept)
        save_hf(url, tiny_model(seed=count, num_layers=2 if kept > 0 else 1))
        load_model(url)
        assert len(copies(tmp_path)) == count
    save_hf(f"{url}-b", model)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: local_copy(f"{url}-b"), range(4)):
            assert (found / "config.json").is_file()
    assert len(copies(tmp_path)) == 2  # of two exports


def test_an_upload_that_was_stopped_is_no_export(url, model, tmp_path, monkeypatch):
    for layers in (1, 3):  # of nothing, then over an export
        done: list[Path] = []

        def stopped(file: Path, path: Path, done: list[Path] = done) -> None:
            if len(done) == 2:
                raise OSError("the process ends here")
            put_file(file, path)
            done.append(path)

        with monkeypatch.context() as patch:
            patch.setattr(directory, "put_file", stopped)
            with pytest.raises(OSError, match="ends here"):
                save_hf(url, tiny_model(num_layers=layers))
        with pytest.raises(CheckpointError, match=r"is not whole: its upload still runs, or was"):
            load_model(url)
        save_hf(url, model)  # over what is left there
        assert_trees_equal(load_model(url).params, model.params)
    assert len(copies(tmp_path)) == 1  # of two equal exports


def test_an_export_replaces_an_export_of_its_type_and_nothing_else(url):
    model, adapter = tiny_model(), AdapterConfig("lora", rank=4)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter))
    lora = partial(save_peft, model=model, adapter=adapter, adapters=adapters)
    saves = {"lora": lora, "full": partial(save_hf, model=model)}
    for name, write in saves.items():
        assert write(f"{url}/{name}")["path"] == f"{url}/{name}"
    assert_trees_equal(load_peft(f"{url}/lora", model)[1], adapters)
    for name, other in (("lora", "full"), ("full", "lora")):
        with pytest.raises(CheckpointError, match="exists and was not written by this project"):
            saves[other](f"{url}/{name}")
        saves[name](f"{url}/{name}")
    put(as_path(url) / "full/notes.txt", b"mine"), put(as_path(url) / "full/README.md", b"mine")
    with pytest.raises(CheckpointError, match=r"were edited: README\.md, notes\.txt\. It is left"):
        save_hf(f"{url}/full", model)


def test_a_damaged_object_is_refused(url, model, tmp_path, monkeypatch):
    save_hf(url, model)
    weights = as_path(url) / "model.safetensors"
    put(weights, weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: it has \d+ bytes"):
        load_model(url)
    save_hf(url, model)
    listed = objects(as_path(url))
    monkeypatch.setattr(directory, "objects", lambda _: listed)
    put(weights, b"new")
    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read: 3 b"):
        load_model(url)
    assert not copies(tmp_path)


def test_a_directory_copied_there_by_other_software(url, model_dir, tmp_path):
    for file in (file for file in model_dir.rglob("*") if file.is_file()):
        put(as_path(url) / file.relative_to(model_dir).as_posix(), file.read_bytes())
    for other in ("original/params.json", "consolidated.safetensors", "x.bin"):
        put(as_path(url) / other, b"{}")
    assert_trees_equal(load_model(url).params, load_model(model_dir).params)
    [copy] = copies(tmp_path)
    found = {path.name for path in copy.rglob("*")}
    assert not found & {"original", "consolidated.safetensors", "x.bin"}
    with pytest.raises(CheckpointError, match=r"no model at .*/nothing: there are no objects"):
        load_model(f"{url}/nothing")


@pytest.mark.soak  # exports and checkpoints in buckets have their own
def test_the_commands_on_a_run_in_a_bucket(bucket, config_file, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "cache"))
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
