"""Small models on disk, runs of a few seconds on them, and rows of a task."""

from __future__ import annotations

import os
from pathlib import Path

import jax

from support.models import tiny_model
from zflora_jax import AdapterConfig, load_base, save_hf
from zflora_jax.core import trees
from zflora_jax.core.families import FAMILIES
from zflora_jax.core.run_config import DataConfig, EvalConfig, OptimConfig, RunConfig, TrainConfig
from zflora_jax.experiments.train import Trained, train
from zflora_jax.training.checkpoint import Checkpoints
from zflora_jax.training.trainer import fresh_state
from zflora_jax.training.workdir import CHECKPOINTS, META, claimed

TASK_DATA = DataConfig(bucket_lengths=(256, 512))
EVAL = EvalConfig(limit=None, batch_size=4, max_new_tokens=6)

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


def saved_base(path: Path, tokenizer: object, family: str = "llama") -> str:
    """A tiny model directory, written to `path`."""
    layers = {"nope_layers": (1,), "num_layers": 2} if FAMILIES[family].nope else {"num_layers": 1}
    model = tiny_model(family=family, max_position_embeddings=512, **layers)
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


def real_data(relative: str = "") -> Path:
    """A file or folder of the real data (never part of the project), named by ZFLORA_DATA or beside
    the checkout; the test is skipped without it.
    """
    import pytest  # not at the top: tools/tiny_model.py works without it

    path = (
        Path(os.environ.get("ZFLORA_DATA") or Path(__file__).parents[3] / "shared" / "data")
        / relative
    )
    if not path.exists():
        pytest.skip(f"{path} is not there; set ZFLORA_DATA to the folder of the real data")
    return path


def claim(workdir: Path, run: RunConfig) -> None:
    """Lets `workdir` look as if `run` had been started there."""
    with claimed(workdir, run):
        pass


def mark_saved(workdir: Path, step: int) -> None:
    """Lets `workdir` look as if the state after `step` were saved there."""
    (workdir / CHECKPOINTS / str(step)).mkdir(parents=True)
    (workdir / CHECKPOINTS / str(step) / META).write_text("{}")


def saved_state(run: RunConfig, workdir: Path) -> trees.Tree:
    """The leaves of all that the newest checkpoint of a run holds, numbered."""
    model = load_base(run)
    with Checkpoints(workdir, create=False) as checkpoints:
        state, _ = checkpoints.restore(jax.eval_shape(lambda: fresh_state(run, model)))
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def quiet_train(run: RunConfig, workdir: Path) -> Trained:
    return train(run, workdir, console=False)
