"""One matmul precision for all that a model does: read off what is lowered."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.grids import always
from support.models import perturb, tiny_model

from zflora_jax import ConfigError, init_adapters, load_model, pack_for_decode, save_hf
from zflora_jax.adapters.fuse import _fuse, fuse, unfuse
from zflora_jax.cli.main import main
from zflora_jax.config import AdapterConfig, OptimConfig
from zflora_jax.evaluation import task
from zflora_jax.inference.likelihood import feed_pieces, token_log_p
from zflora_jax.inference.program import DecodeProgram
from zflora_jax.nn.llama import _forward, forward
from zflora_jax.training.trainer import TrainStep, eval_step, init_state

ADAPTER = AdapterConfig("zflora-uniform", rank=4)


def precisions(lowered: Any) -> set[str]:
    """Of every product in a lowered program."""
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert products
    given = (re.findall(r"precision = \[(\w+), \w+\]", line) for line in products)
    return {name for names in given for name in names or ["DEFAULT"]}


def programs(precision: str) -> dict[str, Any]:
    model = tiny_model(matmul_precision=precision)
    adapters, tokens = init_adapters(jax.random.key(0), model, ADAPTER), jnp.ones((2, 8), jnp.int32)
    batch = {"tokens": tokens, "loss_mask": tokens > 0, "segments": tokens}
    state, both = init_state(adapters, OptimConfig(), 20), {"params": model.params}
    step = TrainStep(model.config, ADAPTER, OptimConfig(), 20, grad_accum_steps=2).jitted()
    ready = pack_for_decode(fuse(model, ADAPTER, adapters))
    c, variables = ready.config, {"params": ready.params}
    assert c.execution.matmul_precision == precision
    keys, program = jax.random.split(jax.random.key(0), 2), DecodeProgram(c)
    given, counts = (variables, tokens, tokens > 0), jnp.zeros(2, jnp.int32)
    prefilled = jax.eval_shape(lambda: program.prefill(*given, keys, 4))
    hidden = jnp.zeros((2, 4, c.base_width))
    return {
        "train step": step.lower(model.params, state, batch),
        "held-out loss": eval_step.lower(
            model.config, ADAPTER, both | {"adapters": adapters}, batch
        ),
        "decode": DecodeProgram.decode.lower(program, *given, keys, 4),
        "prefill": DecodeProgram.prefill.lower(program, *given, keys, 4),
        "decode until": DecodeProgram.decode_until.lower(
            program, variables, prefilled, keys, np.int32(4)
        ),
        "likelihood": feed_pieces.lower(c, ready.params, None, counts, *given[1:], True),
        "likelihood, head": token_log_p.lower(c, ready.params, hidden, counts, counts, counts),
    }


@pytest.mark.parametrize(
    "precision", always(["default", "high", "highest"], lambda name: name == "highest")
)
def test_training_losses_decode_and_likelihoods_agree(precision):
    found = {name: precisions(lowered) for name, lowered in programs(precision).items()}
    assert found == {name: {precision.upper()} for name in found}


@pytest.mark.parametrize("method", ["lora", "zflora-uniform"])
def test_what_must_be_exact_is_highest_whatever_the_setting(method, monkeypatch):
    """The forward for parity, and what fuse adds to a kernel."""
    model, adapter = tiny_model(), AdapterConfig(method, rank=4)
    adapters, seen = init_adapters(jax.random.key(0), model, adapter), []

    def lowered(*args: Any) -> Any:
        seen.append(precisions(_forward.lower(*args)))
        return _forward(*args)

    monkeypatch.setattr("zflora_jax.nn.llama._forward", lowered)
    forward(model, jnp.ones((1, 3), jnp.int32), adapter, adapters)
    assert seen == [{"HIGHEST"}]
    text = _fuse.lower(model.config, adapter, model.params, adapters).as_text()
    assert (
        text.count("dot_general")
        == text.count("precision = [HIGHEST, HIGHEST]")
        == (7 if method == "lora" else 0)
    )


def test_an_export_carries_it_and_is_evaluated_at_it(tmp_path, monkeypatch, capsys):
    """Unless another is named."""
    model = tiny_model(matmul_precision="high", max_position_embeddings=768)
    model.tokenizer, seen = byte_tokenizer(), []
    fused = fuse(model, ADAPTER, perturb(init_adapters(jax.random.key(0), model, ADAPTER)))
    save_hf(tmp_path / "m", fused)
    back = load_model(tmp_path / "m")
    assert back.config == fused.config and unfuse(back)[0].config == model.config

    def evaluated(run: Any, model: Any, *_: Any, **__: Any) -> Any:
        seen.append(model.config.execution.matmul_precision)
        raise ConfigError("seen enough.")

    monkeypatch.setattr(task, "evaluate_tasks", evaluated)
    monkeypatch.setattr(task, "check_tasks", lambda *_: None)
    command = ["eval", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "e")]
    for given in ([], ["--set", "train.matmul_precision=highest"]):
        assert main([*command, *given]) == 2
    assert seen == ["high", "highest"] and "seen enough" in capsys.readouterr().err
