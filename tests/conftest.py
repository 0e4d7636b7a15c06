"""Settings that every test runs under: CPU devices, strict dtypes and ranks, kept programs; the
fixtures that several files use. Helpers that are no fixtures are in `support`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

gc.disable()  # until `pytest_collection_finish`
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# XLA's former way to compile fused loops takes half the time (jaxlib 0.10.2: a train step of the
# tiny model 1.8 s of CPU time for 4.1), and programs in one part instead of many a seventh less.
# Its threads can both write to a byte that two rows of int4 share, where rows are odd, and lose a
# code: once in thousands of runs; the way that users have did not (30,000 runs of a concatenation).
# A jaxlib that does not know a flag would end the process. With ZFLORA_TEST_XLA=default, as in
# `make soak`, programs are compiled as those of users are.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
former = version("jaxlib").startswith("0.10.") and os.environ.get("ZFLORA_TEST_XLA") != "default"
if former and QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()

import jax
import jax.numpy as jnp
import jaxlib
import pytest
from jax._src import monitoring

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_traceback_in_locations_limit", 0)  # else a tenth of the time writes them

from support.bucket import new_bucket, server, use_store
from support.byte_tokenizer import byte_tokenizer
from support.grids import always
from support.models import tiny_model
from support.runs import CONFIG, TASK_DATA, choice, saved_base, small_run

from zflora_jax import DataConfig, EvalConfig, Model, OptimConfig, RunConfig, TrainConfig, save_hf
from zflora_jax.cli.main import main
from zflora_jax.parallel import compile_cache as cache_module
from zflora_jax.parallel.compile_cache import compile_cache

COMPILED_BYTES = 2 * 2**30  # kept programs that take more are compiled anew


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a test run that its workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def machine() -> str:
    """Names what compiled programs depend on: jaxlib and the instructions of the CPU."""
    file = Path("/proc/cpuinfo")
    known = file.read_text() if file.is_file() else platform.processor()
    cpu = re.findall(r"^(?:flags|Features|model name).*$", known, re.MULTILINE)[:2] or [known]
    return f"{jaxlib.__version__}-{platform.machine()}-{zlib.crc32(''.join(cpu).encode()):08x}"


def pytest_configure(config: pytest.Config) -> None:
    """Kept programs do not pile up: every change of the code leaves some that nobody asks for."""
    if "PYTEST_XDIST_WORKER" in os.environ or not hasattr(config, "cache"):
        return
    folder = config.cache.mkdir("compiled")
    if sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > COMPILED_BYTES:
        shutil.rmtree(folder)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory):
    """Programs are shared by the workers of a test run and kept for the next one, in .pytest_cache
    (`-p no:cacheprovider` keeps none). All of them: most are small, and there are thousands.
    """
    folder = shared_folder(tmp_path_factory)
    if hasattr(pytestconfig, "cache"):
        folder = pytestconfig.cache.mkdir("compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with compile_cache(folder / machine()):
        yield


@pytest.fixture(scope="session", autouse=True)
def prepared_once(tmp_path_factory: pytest.TempPathFactory):
    """Prepared data is shared by the workers of a test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZFLORA_CACHE", str(shared_folder(tmp_path_factory) / "prepared"))
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """After a file of tests, before too many are in memory: each takes maps of the process, of
    which Linux gives it 65,530; then XLA cannot load another one.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.is_file() or maps.read_bytes().count(b"\n") > 6_000:
        jax.clear_caches()


@pytest.fixture
def own_data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data is prepared anew for the test."""
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "tfds"))


@pytest.fixture
def optimised():
    """For models of real size, where slow programs cost more than their compilation."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def own_programs():
    """As a process starts: without the directory that the tests share, or a program in memory."""
    name = "jax_persistent_cache_min_compile_time_secs"
    with cache_module._configured({"jax_compilation_cache_dir": None, name: 1.0}):
        jax.clear_caches()
        yield


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How often a program was taken from a cache."""
    counted: list[str] = []
    monkeypatch.setattr(cache_module, "KEPT_FROM_SECONDS", 0.0)

    def listen(event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            counted.append(event)

    monitoring.register_event_listener(listen)
    yield counted
    monitoring.unregister_event_listener(listen)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(7), (3, 11), 0, 256, jnp.int32)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model directory with a byte tokenizer."""
    return saved_base(tmp_path_factory.mktemp("base") / "model", byte_tokenizer())


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    from support.exports import saved_bases  # torch: only where it is needed

    return saved_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    with server("s3") as address:
        yield address


@pytest.fixture(scope="session")
def gs() -> Iterator[str]:
    """The address of an emulator of Google Cloud Storage on loopback."""
    with server("gs") as address:
        yield address


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket, s3://..."""
    use_store(monkeypatch, "s3", s3)
    return new_bucket("s3")


@pytest.fixture(params=always(["s3", "gs"], "s3".__eq__))
def each_bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket, of each kind of store."""
    use_store(monkeypatch, request.param, request.getfixturevalue(request.param))
    return new_bucket(request.param)


@pytest.fixture
def run(base_dir: str) -> RunConfig:
    return small_run(base_dir)


@pytest.fixture(scope="session")
def model() -> Model:
    """A tiny model with a byte tokenizer, whose answers vary: tied, it would repeat one token."""
    model = tiny_model(num_layers=1, max_position_embeddings=768, tie_word_embeddings=False)
    model.tokenizer = byte_tokenizer()
    return model


@pytest.fixture
def arc(tmp_path: Path) -> DataConfig:
    """A data directory with 30 train and 12 test rows of ARC-Easy; 3 of the test rows are train
    rows written otherwise.
    """
    folder = tmp_path / "ARC-Easy"
    folder.mkdir()
    # One answer: the rows found again score otherwise than the clean ones.
    train = [choice(i, "answer1") for i in range(100, 130)]
    again = [
        row | {"instruction": row["instruction"].replace("Question", "QUESTION ,")}
        for row in train[:3]
    ]
    test = [choice(i, f"answer{i % 3 + 1}") for i in range(9)] + again
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return dataclasses.replace(TASK_DATA, task="arc_easy", data_dir=str(tmp_path))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(num_layers=1, max_position_embeddings=400)
    model.tokenizer = byte_tokenizer()
    path = tmp_path_factory.mktemp("base") / "model"
    save_hf(path, model)
    return path


@pytest.fixture(scope="session")
def config_file(model_dir: Path) -> str:
    path = model_dir.parent / "config.py"
    path.write_text(CONFIG.format(model=str(model_dir)))
    return str(path)


@pytest.fixture(scope="session")
def trained_dir(config_file: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of two steps, for reading; what changes it works on a copy."""
    path = str(tmp_path_factory.mktemp("run") / "a")
    assert main(["train", "--config", config_file, "--workdir", path]) == 0
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must be refused; returns the message."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        captured = capsys.readouterr()
        message = captured.err[captured.err.index("error: ") :]
        assert "Traceback" not in captured.err and captured.out == ""
        assert len(message) > 20 and message.rstrip()[-1] in ".)", message
        return message

    return run


@pytest.fixture
def two_steps(model, arc, tmp_path):
    """A run of two steps on `arc`."""
    save_hf(tmp_path / "model", model)
    return RunConfig(
        model=str(tmp_path / "model"),
        data=dataclasses.replace(arc, batch_size=2),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=2, save_every=None, loss_chunk=128),
        eval=EvalConfig(limit=2),
    )


def pytest_collection_finish() -> None:
    """What was imported stays, so the garbage collector leaves it out of its rounds."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
