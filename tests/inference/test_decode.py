"""Greedy decoding equals the `generate` of stock transformers token for token, with adapters fused
or beside the base; rows stop at their own token, and a damaged model raises.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.cases import CASES, UNIFORM, case_id
from support.checks import assert_logits_close
from support.grids import always
from support.models import perturb, tiny_fused, untied

from zflora_jax import ConfigError, Model, NonFiniteError, Sampler, forward, init_adapters, save_hf
from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.inference.program import DecodeProgram

NEW = 64


OF_LORA = [{"use_dora": True}, {"layers_to_transform": (1,)}]
BESIDE = [a for a in CASES if a.method != "full"]
BESIDE += [AdapterConfig("lora", rank=4, **more) for more in OF_LORA]


@pytest.mark.parametrize("adapter", always(BESIDE, UNIFORM.__eq__), ids=case_id)
def test_adapters_beside_the_base_answer_as_fused(adapter):
    """Un-merged adapters over packed base kernels: logits within the contract's tolerance, the same
    greedy tokens, in either layout of layers.
    """
    model = untied()
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5, 4], [100]]
    fused, base = fuse(model, adapter, adapters), pack_for_decode(model, unmerged=adapter)
    flat = trees.unstack_layers(adapters, model.config.num_layers)
    tokens = np.asarray([[1, 2, 3, 4], [7, 9, 100, 3]], np.int32)
    assert_logits_close(forward(base, tokens, adapter, flat), forward(fused, tokens))
    want = generate_tokens(fused, prompts, max_new_tokens=12)
    assert want != generate_tokens(model, prompts, max_new_tokens=12)
    for tree in (adapters, flat):
        assert (
            generate_tokens(model, prompts, max_new_tokens=12, adapter=adapter, adapters=tree)
            == want
        )


@pytest.mark.parametrize("method", ["zflora-uniform", "ffba", "zflora-minimal"])
@pytest.mark.soak  # each half has its own
def test_lora_beside_a_fused_model_answers_as_merged_into_it(method):
    """Its kernels are not packed then: neither filled up, nor scaled, nor in another order."""
    base, wide = untied(), AdapterConfig(method, rank=6, extra_mlp_units=5)
    fused = fuse(base, wide, perturb(init_adapters(jax.random.key(1), base, wide)))
    alone = Model(fused.config, fused.params)
    lora = AdapterConfig("lora", rank=3)
    adapters = perturb(init_adapters(jax.random.key(2), alone, lora))
    prompts = [[1, 2, 3], [9, 8, 7, 6]]
    want = generate_tokens(fuse(alone, lora, adapters), prompts, max_new_tokens=8)
    assert want != generate_tokens(fused, prompts, max_new_tokens=8)
    for model in (fused, alone):
        got = generate_tokens(model, prompts, max_new_tokens=8, adapter=lora, adapters=adapters)
        assert got == want
    tokens, apart = np.asarray([[1, 2]], np.int32), trees.unstack_layers(adapters, 2)
    with pytest.raises(ConfigError, match="Adapters need the unpacked fused model"):
        forward(pack_for_decode(fused), tokens, lora, apart)


@pytest.mark.parametrize(
    ("adapter", "given", "message"),
    [
        (AdapterConfig("lora", rank=2), None, "adapter and adapters go together"),
        (AdapterConfig("full"), AdapterConfig("full"), r"decode packs: use zf.fuse\(model, a"),
        (
            AdapterConfig("lora", rank=3),
            AdapterConfig("lora", rank=2),
            r"adapters of method 'lora': .*expected .*, 3",
        ),
    ],
    ids=["none", "full", "another"],
)
def test_wrong_adapters_beside_the_base_are_refused(adapter, given, message):
    model = untied()
    adapters = init_adapters(jax.random.key(0), model, given) if given else None
    with pytest.raises(ValueError if given and given.rank == 2 else ConfigError, match=message):
        generate_tokens(model, [[1]], max_new_tokens=2, adapter=adapter, adapters=adapters)


def stock_greedy(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The answers of transformers' generate to one left-padded batch; nothing ends a row."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are slow beside other test workers
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
    torch.set_num_threads(threads)
    return out[:, width:].tolist()


# --- greedy decoding equals transformers ----------------------------------------------------------


@pytest.mark.parametrize(
    "method", always(["base", *METHODS], ("base", "lora", "zflora-uniform").__contains__)
)
def test_greedy_equals_transformers(method: str, tmp_path: Path) -> None:
    model = tiny_fused(method)
    save_hf(tmp_path / "out", model)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 256, n).tolist() for n in (9, 1, 23, 16)]
    answers = generate_tokens(model, prompts, max_new_tokens=NEW, stop_token_ids=())
    assert np.mean([len(set(answer)) for answer in answers]) >= 15, "it repeats itself"
    assert answers == stock_greedy(tmp_path / "out", prompts)
    assert answers[:1] == generate_tokens(model, prompts[:1], max_new_tokens=NEW, stop_token_ids=())


# --- a row ends by itself -------------------------------------------------------------------------


def test_each_row_stops_at_its_own_token() -> None:
    model, prompts = untied(), [[5, 6, 7], [100], [30, 31, 32, 33]]
    free = generate_tokens(model, prompts, max_new_tokens=24, stop_token_ids=())
    assert [len(answer) for answer in free] == [24, 24, 24]
    stop = (free[0][4], free[1][9])  # several ids; any of them ends any row
    want = [
        answer[: next((i + 1 for i, t in enumerate(answer) if t in stop), 24)] for answer in free
    ]
    assert len({len(answer) for answer in want}) > 1 and max(map(len, want[:2])) < 24
    for size, stops in ((1, stop), (2, stop[::-1]), (3, stop)):
        settings = {"max_new_tokens": 24, "batch_size": size, "stop_token_ids": stops}
        assert generate_tokens(model, prompts, **settings) == want


def test_the_config_s_eos_is_the_default_and_an_empty_stop_never_stops() -> None:
    model, prompts = untied(), [[5, 6, 7], [100]]
    free = generate_tokens(model, prompts, max_new_tokens=20, stop_token_ids=())
    eos = free[0][3]
    ending = Model(model.config.replace(eos_token_ids=(257, eos)), model.params)
    got = generate_tokens(ending, prompts, max_new_tokens=20)
    assert got[0] == free[0][: free[0].index(eos) + 1] and len(got[0]) <= 4
    assert generate_tokens(ending, prompts, max_new_tokens=20, stop_token_ids=()) == free
    endless = Model(model.config.replace(eos_token_ids=()), model.params)
    assert generate_tokens(endless, prompts, max_new_tokens=20) == free


class CountingSampler(Sampler):
    """Greedy; notes every step that is run."""

    steps: list[int] = []  # noqa: RUF012 - one list for the test that reads it

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: self.steps.append(1))
        return super().__call__(logits, keys)


def test_nothing_is_computed_or_written_after_the_last_row_has_ended() -> None:
    model = pack_for_decode(untied())
    tokens = np.asarray([[5, 6, 7, 8], [0, 0, 100, 3], [0, 0, 0, 0]], np.int32)
    valid = np.asarray([[1] * 4, [0, 0, 1, 1], [0] * 4], bool)
    keys = jax.random.split(jax.random.key(0), 3)
    given = {"params": model.params}, tokens, valid, keys, 20
    free = np.asarray(DecodeProgram(model.config).decode(*given))
    assert (free[2] == -1).all() and (free[:2] >= 0).all()  # a filler yields nothing
    stop = (int(free[0, 3]), int(free[1, 6]))
    lengths = [next(i + 1 for i, t in enumerate(row) if t in stop) for row in free[:2]]
    counting = DecodeProgram(model.config, None, CountingSampler(), stop)
    out = np.asarray(counting.decode(*given))
    jax.effects_barrier()
    assert len(CountingSampler.steps) == max(lengths) < 20
    for row, length, want in zip(out, lengths, free, strict=False):
        assert (row[:length] == want[:length]).all() and (row[length:] == -1).all()
    assert (out[2] == -1).all()


# --- a damaged model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", always([{}, {"sampler": Sampler(1.0)}], lambda case: not case), ids=str
)
def test_logits_that_are_not_numbers_raise(settings: dict[str, Any]) -> None:
    """One token's embedding is NaN: prompts without it are answered, those with it named."""
    model = untied()
    table = model.params["embed"]["embedding"].at[9].set(jnp.nan)
    damaged = Model(model.config, model.params | {"embed": {"embedding": table}})
    settings = {"max_new_tokens": 5, "stop_token_ids": ()} | settings
    whole = generate_tokens(damaged, [[1, 2], [3]], batch_size=1, **settings)
    assert [len(answer) for answer in whole] == [5, 5]
    with pytest.raises(NonFiniteError, match="logits of prompt 1 are NaN or infinite"):
        generate_tokens(damaged, [[1, 2], [3, 9, 4], [3]], **settings)
