"""Beam search: the best hypothesis equals stock transformers' generate(num_beams=K) token for
token; stopping, fillers, batches, wrong input.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.grids import always
from support.models import tiny_model

from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core.model import Model
from zflora_jax.hf.save import save_hf
from zflora_jax.inference.beam import BeamProgram
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.inference.generation_config import Sampler

NEW = 20
PROMPTS = [
    np.random.default_rng(3).integers(0, 256, 28).tolist()[i:j]
    for i, j in ((0, 9), (9, 10), (10, 24), (12, 28))
]
PROMPTS += [[231, 156]]
# Tokens that the beams of PROMPTS draw; each makes a rule of the search decide: the K best alone
# may finish (one, three), 2K candidates would be too few (third), a row that has ended takes in
# nothing more (half).
STOPS: dict[str, tuple[int, ...]] = {
    "none": (),
    "one": (95,),
    "three": (20, 79, 252),
    "third": tuple(range(0, 256, 3)),
    "half": tuple(range(0, 256, 2)),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(seed=1, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def stock(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`model` in transformers."""
    import torch
    import transformers

    path: Path = tmp_path_factory.mktemp("stock") / "out"
    save_hf(path, model)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def stock_beams(
    stock: Any, prompts: list[list[int]], num_beams: int, stop: tuple[int, ...], new: int = NEW
) -> list[list[int]]:
    """What transformers' beam search answers to prompts left-padded to one batch, cut after the
    stop token: the rest is its filling.
    """
    import torch

    width, threads = max(map(len, prompts)), torch.get_num_threads()
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    rules: dict[str, Any] = {
        "do_sample": False,
        "num_beams": num_beams,
        "length_penalty": 1.0,
        "early_stopping": False,
    }
    stock.generation_config.eos_token_id = list(stop) or None
    torch.set_num_threads(1)  # threads that wait for each other are slow beside other test workers
    with torch.no_grad():
        out = stock.generate(ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **rules)[
            :, width:
        ].tolist()
    torch.set_num_threads(threads)
    return [row[: next((i + 1 for i, t in enumerate(row) if t in stop), new)] for row in out]


@pytest.mark.parametrize(
    ("num_beams", "stop"),
    always(
        [(4, "none"), (4, "three"), (4, "half"), (2, "one"), (2, "third")],
        lambda case: case in [(4, "none"), (4, "half"), (2, "one")],
    ),
)
def test_beams_equal_transformers(model: Model, stock: Any, num_beams: int, stop: str) -> None:
    """A batch; and single prompts where a stop token ends them early: an answer does not depend on
    the rows beside it, either.
    """
    settings: dict[str, Any] = {"max_new_tokens": NEW, "stop_token_ids": STOPS[stop]}
    batch = generate_tokens(model, PROMPTS, num_beams=num_beams, **settings)
    assert batch == stock_beams(stock, PROMPTS, num_beams, STOPS[stop])
    if stop == "half":
        single = generate_tokens(model, PROMPTS, num_beams=num_beams, batch_size=1, **settings)
        assert single == [stock_beams(stock, [p], num_beams, STOPS[stop])[0] for p in PROMPTS]
        assert single == batch
    if stop == "none":
        assert batch != generate_tokens(model, PROMPTS, **settings), (
            "a weak comparison: the beams find nothing beyond greedy"
        )
    short = [len(answer) < NEW for answer in batch]
    assert any(short) == bool(STOPS[stop]) and (stop in ("third", "half") or not all(short)), (
        "max_new_tokens or a stop token alone ends all"
    )


def test_answers_come_in_the_order_of_the_prompts_and_one_beam_is_greedy(model: Model) -> None:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "stop_token_ids": STOPS["three"]}
    want = generate_tokens(model, PROMPTS, num_beams=4, **settings)
    done: dict[int, list[int]] = {}
    found = generate_tokens(
        model, PROMPTS[::-1], num_beams=4, batch_size=3, on_answer=done.__setitem__, **settings
    )
    assert found == want[::-1] and done == dict(enumerate(found))
    assert (
        generate_tokens(model, PROMPTS, num_beams=4, sampler=Sampler(), seed=5, **settings) == want
    )
    assert (
        generate_tokens(model, PROMPTS, num_beams=1, **settings)
        == generate_tokens(model, PROMPTS, **settings)
        != want
    )


def test_fillers_yield_nothing_and_layers_may_be_stacked(model: Model) -> None:
    """Without stop tokens one beam is greedy decoding also in a beam search."""
    tokens = np.asarray([[5, 6, 7, 8], [0] * 4, [0, 0, 100, 3]], np.int32)
    valid = np.asarray([[1] * 4, [0] * 4, [0, 0, 1, 1]], bool)
    greedy = generate_tokens(model, [[5, 6, 7, 8], [100, 3]], max_new_tokens=6, stop_token_ids=())
    for form in (model, pack_for_decode(model)):
        out = np.asarray(
            BeamProgram(form.config, None, 1).search({"params": form.params}, tokens, valid, 6)
        )
        assert out.dtype == np.int32 and out[[0, 2]].tolist() == greedy and (out[1] == -1).all()
    stacked, flat = (
        np.asarray(
            BeamProgram(form.config, None, 3).search({"params": form.params}, tokens, valid, 6)
        )
        for form in (model, pack_for_decode(model))
    )
    assert (
        model.config.execution.scan_layers
        and (stacked == flat).all()
        and (flat[[0, 2]] >= 0).all()
        and (flat[1] == -1).all()
    )
    assert flat[[0, 2]].tolist() != greedy


def test_one_call_runs_each_prompt_once(model: Model) -> None:
    form, tokens = pack_for_decode(model), jnp.ones((3, 16), jnp.int32)
    program = BeamProgram(form.config, None, 5, (257,))
    jaxpr = jax.make_jaxpr(partial(program.search, max_new_tokens=8))(
        {"params": form.params}, tokens, tokens > 0
    )
    assert len(jaxpr.jaxpr.eqns) == 1 and jaxpr.out_avals[0].shape == (3, 8)
    width = form.config.hidden_size
    assert (
        f"f32[3,16,{width}]" in str(jaxpr)
        and f"f32[15,1,{width}]" in str(jaxpr)
        and f"f32[15,16,{width}]" not in str(jaxpr)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, r"num_beams=0: must be at least 1 \(1 is no beam search\)"),
        (
            {"num_beams": 4, "sampler": Sampler(0.7)},
            (
                "num_beams=4 with a sampler of temperature 0.7: .*Leave the sampler out, or set"
                " num_beams=1"
            ),
        ),
        (
            {"num_beams": 258, "stop_token_ids": (1, 2)},
            "num_beams=258: must be at most 257, the number of tokens that do not stop",
        ),
    ],
    ids=["no beams", "a sampler", "more beams than tokens"],
)
def test_beams_that_cannot_be_searched(
    model: Model, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tokens(model, [[1]], max_new_tokens=4, **settings)
