"""Settings that every test runs under: CPU devices, strict dtypes and ranks; a tiny model whose
outputs vary; perturbed adapters.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from zflora_jax.adapters.methods import live_layers
from zflora_jax.cli.main import main
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig, preset
from zflora_jax.core.run_config import DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig
from zflora_jax.hf.save import save_hf
from zflora_jax.nn.llama import random_model
from zflora_jax.parallel import compile_cache as cache_module
from zflora_jax.parallel.compile_cache import compile_cache

# float32: max |dlogit| <= TOLERANCE * max |logit|. CONTRIBUTING.md: never relaxed to make a test
# pass.
TOLERANCE = 1e-5


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory):
    """Programs are shared by all workers of a test run: many tests compile the same ones."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with compile_cache(shared / "compiled"):
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped():
    """After a file of tests: every program in memory takes maps of the process, of which Linux
    gives it 65,530; then XLA cannot load another one.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def optimised():
    """For models of real size, where slow programs cost more than their compilation."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def own_programs():
    """As a process starts: without the directory that the tests share."""
    shared, least = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    cache_module._use(None, 1.0)
    yield
    cache_module._use(shared, least)


def perturb(tree: trees.Tree, seed: int = 1, std: float = 0.1) -> trees.Tree:
    """`tree` plus noise at every leaf: without it, zero blocks would hide a wrong sign, scale or
    place.
    """
    rng = np.random.default_rng(seed)
    return trees.map_with_names(
        lambda _, x: x + jnp.asarray(std * rng.standard_normal(x.shape), x.dtype), tree
    )


def tiny_model(seed: int = 0, **changes: object) -> Model:
    """A tiny Model with kernels large enough that all of them matter, and norm gains that are not
    1. Untied, its greedy output varies too.
    """
    model = random_model(preset("tiny").replace(**changes), jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def scaled(name: str, x: jax.Array) -> jax.Array:
        if name.endswith("scale"):
            return x + jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)
        return x * (5.0 if "layers" in name else 20.0)

    model.params = trees.map_with_names(scaled, model.params)
    return model


def narrow_and_wide(**changes: object) -> tuple[Model, Model]:
    """A tiny model in bfloat16, and the same numbers computed with in float32."""
    model = tiny_model(seed=1, **changes)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    return Model(model.config.replace(dtype="bfloat16"), rounded), Model(model.config, wide)


def untied(**changes: object) -> Model:
    """A tiny model whose greedy output goes on changing: with tied embeddings it soon repeats the
    token it was given.
    """
    return tiny_model(seed=1, tie_word_embeddings=False, **changes)


def assert_logits_close(got: object, want: object) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    gap, scale = np.abs(got - want).max(), np.abs(want).max()
    assert gap <= TOLERANCE * scale, f"max |dlogit| {gap:.3g} exceeds {TOLERANCE} x {scale:.3g}"


def assert_trees_equal(got: trees.Tree, want: trees.Tree) -> None:
    got_flat, want_flat = trees.flatten(got), trees.flatten(want)
    assert got_flat.keys() == want_flat.keys()
    for name, leaf in want_flat.items():
        np.testing.assert_array_equal(np.asarray(got_flat[name]), np.asarray(leaf), err_msg=name)


def real_data(relative: str = "") -> Path:
    """A file or folder of the real data (never part of the project), named by ZFLORA_DATA or beside
    the checkout; the test is skipped without it.
    """
    path = (
        Path(os.environ.get("ZFLORA_DATA") or Path(__file__).parents[2] / "shared" / "data")
        / relative
    )
    if not path.exists():
        pytest.skip(f"{path} is not there; set ZFLORA_DATA to the folder of the real data")
    return path


@pytest.fixture
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(7), (3, 11), 0, 256, jnp.int32)


def adapter_cases() -> list[AdapterConfig]:
    """Every method, and the variants that take other paths through the code. alpha / rank is 1.5: a
    scale of 1 or a power of two would hide mistakes.
    """
    cases = [AdapterConfig(method, rank=6, alpha=9.0) for method in METHODS]
    cases += [
        AdapterConfig(m, rank=6, alpha=9.0, targets=t)
        for m in METHODS
        for t in ("attention", "mlp")
        if m != "full"
    ]
    cases += [
        AdapterConfig(m, rank=5, alpha=7.5, extra_head_dim=16, extra_mlp_units=7, head_scores=s)
        for m in ("zflora-uniform", "ffba")
        for s in (True, False)
    ]
    cases += [
        AdapterConfig("zflora-minimal", rank=6, alpha=9.0, targets="q|v|o|down"),
        AdapterConfig("ffba", rank=6, alpha=9.0, targets="q|k"),
    ]
    return cases


def dead_slices(
    config: LlamaConfig, adapter: AdapterConfig, adapters: trees.Tree
) -> list[np.ndarray]:
    """What `live_layers` leaves out of a tree of stacked adapters: one array for each dead layer of
    a block.
    """
    live = live_layers(config, adapter)
    found = []
    for name, leaf in trees.flatten(adapters).items():
        *_, kernel, block = name.split("/")
        alive = live[kernel][block] if kernel in live else range(config.num_layers)
        found += [np.asarray(leaf[i]) for i in range(config.num_layers) if i not in alive]
    return found


def case_id(adapter: AdapterConfig) -> str:
    parts = [
        adapter.method,
        adapter.targets.replace("|", ""),
        "" if adapter.head_scores else "values",
        str(adapter.extra_head_dim or ""),
    ]
    return "-".join(p for p in parts if p and p != "all")


def saved_base(path: Path, tokenizer: object) -> str:
    """A tiny model directory, written to `path`."""
    model = tiny_model(num_layers=2, max_position_embeddings=512)
    model.params = jax.tree.map(lambda x: x / 4, model.params)
    model.tokenizer = tokenizer
    save_hf(path, model)
    return str(path)


def small_run(base_dir: str) -> RunConfig:
    """A run of a few seconds on a model of `saved_base`."""
    return RunConfig(
        model=base_dir,
        adapter=AdapterConfig("zflora-minimal", rank=4),
        data=DataConfig(
            batch_size=4, grad_accum_steps=2, bucket_lengths=(256, 320), train_limit=40
        ),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(steps=8, save_every=2, log_every=1, loss_chunk=128),
        eval=EvalConfig(limit=4, batch_size=4, max_new_tokens=8),
    )


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model directory with a byte tokenizer."""
    return saved_base(tmp_path_factory.mktemp("base") / "model", byte_tokenizer())


@pytest.fixture
def run(base_dir: str) -> RunConfig:
    return small_run(base_dir)


TASK_DATA = DataConfig(bucket_lengths=(256, 512))
EVAL = EvalConfig(limit=None, batch_size=4, max_new_tokens=6)


@pytest.fixture(scope="session")
def model() -> Model:
    """A tiny model with a byte tokenizer, whose answers vary: tied, it would repeat one token."""
    model = tiny_model(max_position_embeddings=768, tie_word_embeddings=False)
    model.tokenizer = byte_tokenizer()
    return model


def choice(i: int, answer: str = "answer2") -> dict[str, str]:
    """A row of ARC-Easy in LLM-Adapters' form."""
    words = (
        f"Question {i}{'?' * (i % 5 + 1)}\n\nAnswer1: {i} Answer2: {i + 1} Answer3: no\n\nAnswer"
        " format: answer1/answer2/answer3"
    )
    return {
        "instruction": words,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


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
        row | {"instruction": row["instruction"].replace("Question", "QUESTION --")}
        for row in train[:3]
    ]
    test = [choice(i, f"answer{i % 3 + 1}") for i in range(9)] + again
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return dataclasses.replace(TASK_DATA, task="arc_easy", data_dir=str(tmp_path))


CONFIG = """
from zflora_jax.config import *

def get_config():
    return RunConfig(
        model={model!r},
        adapter=AdapterConfig("zflora-minimal", rank=4),
        data=DataConfig(batch_size=2, bucket_lengths=(320,), train_limit=8),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=2, loss_chunk=128),
        eval=EvalConfig(limit=2, batch_size=2, max_new_tokens=4),
    )
"""


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Prepared data goes to a directory of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZFLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model_dir(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(num_layers=1, max_position_embeddings=400)
    model.tokenizer = byte_tokenizer()
    path = tmp_path_factory.mktemp("base") / "model"
    save_hf(path, model)
    return path


@pytest.fixture(scope="module")
def config_file(model_dir: Path) -> str:
    path = model_dir.parent / "config.py"
    path.write_text(CONFIG.format(model=str(model_dir)))
    return str(path)


@pytest.fixture(scope="module")
def trained_dir(config_file: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run of two steps."""
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
