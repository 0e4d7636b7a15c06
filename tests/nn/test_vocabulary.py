"""Tokens that the embedding has no row for are refused where they enter; resize_vocab gives them
one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close, assert_trees_equal
from support.models import perturb, tiny_model

from zflora_jax.adapters.fuse import fuse, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import DataConfig, MeshConfig
from zflora_jax.data.encoding import tokenize_examples
from zflora_jax.data.tasks import Example
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.train import train
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.inference.decode import generate_tokens, stream_tokens
from zflora_jax.inference.likelihood import option_log_likelihoods
from zflora_jax.inference.text import generate
from zflora_jax.nn.llama import forward
from zflora_jax.nn.vocabulary import resize_vocab
from zflora_jax.parallel.sharding import make_mesh, shard

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|im_end|>' }}{% endfor %}{%"
    " if add_generation_prompt %}[assistant]{% endif %}"
)
REFUSED = (
    r"token ids outside 0\.\.258: 259 \('<\|im_end\|>'\).*no embedding.*zf\.resize_vocab\(model,"
    r" model\.tokenizer\)"
)


def ids(*row: int) -> np.ndarray:
    return np.asarray([row], np.int32)


def wider_tokenizer() -> Any:
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    tokenizer.add_tokens(["<|im_end|>"])
    return tokenizer


@pytest.fixture
def model() -> Model:
    model = tiny_model()
    model.tokenizer = wider_tokenizer()
    return model


# --- refused -------------------------------------------------------------------------------------


def test_training_data_beyond_the_embedding_is_refused(run, tmp_path):
    """Before anything is trained or claimed; it was "the loss is nan at step 1"."""
    base = load_base(run)
    base.tokenizer = wider_tokenizer()
    with pytest.raises(
        ConfigError,
        match=r"tokens were changed \(see zf\.resize_vocab\)",
    ):
        train(run, tmp_path / "run", model=base, console=False)
    save_hf(tmp_path / "base", base)
    run = override(run, {"model": str(tmp_path / "base")})
    with pytest.raises(ConfigError, match=f"the tokenised data holds {REFUSED}"):
        train(run, tmp_path / "run", console=False)
    assert not (tmp_path / "run").exists()


def test_a_padding_token_without_a_row_is_refused():
    """It is masked, but NaN times zero is NaN."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    examples = [Example("q", "t", "1")]
    with pytest.raises(
        ConfigError, match=r"259 \('\[PAD\]'\).*tokenizer\.pad_token = tokenizer\.eos_token"
    ):
        tokenize_examples(examples, tokenizer, DataConfig(), 259)
    assert tokenize_examples(examples, tokenizer, DataConfig(), 260).pad_id == 259


@pytest.mark.parametrize(
    "use",
    [
        lambda model: forward(model, ids(1, 259)),
        lambda model: forward(model, jnp.asarray([[1, 259]])),
        lambda model: generate_tokens(model, [[1, 259]], max_new_tokens=2),
        lambda model: next(stream_tokens(model, [1, 259], max_new_tokens=2)),
        lambda model: generate(model, ["hi"], chat=True, max_new_tokens=2),
        lambda model: option_log_likelihoods(model, [[1]], [[[2], [259]]]),
    ],
    ids=["forward", "forward of an array", "tokens", "stream", "text", "likelihood"],
)
def test_use_of_a_token_without_a_row_is_refused(use, model):
    with pytest.raises(ConfigError, match=REFUSED):
        use(model)


def test_ids_of_no_token_are_another_tokenizer_s(model):
    for row in ((1, 260), (-1, 2), (259, 1000)):
        with pytest.raises(
            ConfigError, match=r"outside 0\.\.258: is this the model's own tokenizer"
        ):
            forward(model, ids(*row))


# --- resized -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False, "scan_layers": False}],
    ids=["tied, stacked", "untied, apart"],
)
def test_new_rows_are_the_mean_and_nothing_else_changes(changes, tokens):
    model = tiny_model(**changes)
    wider = resize_vocab(model, wider_tokenizer())
    assert wider.config == model.config.replace(vocab_size=260) and len(wider.tokenizer) == 260
    assert {n: x.shape for n, x in trees.flatten(wider.params).items()} == param_shapes(
        wider.config
    )
    assert model.config.vocab_size == 259 and model.tokenizer is None  # left as it is
    mean = np.asarray(model.params["embed"]["embedding"], np.float64).mean(0)
    np.testing.assert_allclose(wider.params["embed"]["embedding"][259], mean, rtol=1e-5, atol=1e-6)
    if "tie_word_embeddings" in changes:
        mean = np.asarray(model.params["lm_head"]["kernel"], np.float64).mean(1)
        np.testing.assert_allclose(
            wider.params["lm_head"]["kernel"][:, 259], mean, rtol=1e-5, atol=1e-6
        )
    back = resize_vocab(Model(wider.config, wider.params), 260)
    assert_trees_equal(back.params, wider.params)
    logits = forward(wider, tokens)
    assert_logits_close(logits[..., :259], forward(model, tokens))
    assert np.isfinite(forward(wider, ids(259, 1))).all()


def test_the_mean_is_rounded_once():
    model = tiny_model()
    model.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    table = model.params["embed"]["embedding"]
    new = resize_vocab(model, 261).params["embed"]["embedding"]
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(new[:259], table)
    np.testing.assert_array_equal(
        new[260], jnp.mean(table.astype(jnp.float32), axis=0).astype(jnp.bfloat16)
    )


def test_trained_rows_and_fused_models(tokens):
    base, adapter = (
        tiny_model(tie_word_embeddings=False, num_layers=3),
        AdapterConfig("zflora-minimal", rank=6),
    )
    adapters = perturb(init_adapters(jax.random.key(1), base, adapter))
    rows, head = np.random.default_rng(0).standard_normal((2, 2, 64)).astype(np.float32)
    given = {"rows": rows, "head_rows": head}
    early = fuse(resize_vocab(base, 261, **given), adapter, adapters)
    late = resize_vocab(fuse(base, adapter, adapters), 261, **given)
    assert late.config == early.config and late.adapter == adapter
    assert_trees_equal(late.params, early.params)
    stripped = unfuse(late)[0]
    np.testing.assert_array_equal(stripped.params["embed"]["embedding"][259:], rows)
    np.testing.assert_array_equal(stripped.params["lm_head"]["kernel"][:, 259:], head.T)


def test_on_a_mesh():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    model = tiny_model(vocab_size=260, tie_word_embeddings=False)
    divided = dataclasses.replace(model, params=shard(model.params, mesh))
    wider = resize_vocab(divided, 264)
    table = wider.params["embed"]["embedding"]
    assert table.sharding.spec == divided.params["embed"]["embedding"].sharding.spec
    assert {part.data.shape for part in table.addressable_shards} == {(132, 32)}
    one = resize_vocab(model, 264)
    for name, leaf in trees.flatten(one.params).items():
        np.testing.assert_allclose(
            trees.flatten(wider.params)[name], leaf, rtol=1e-6, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize(
    ("size", "rows", "message"),
    [
        (258, {}, r"the largest is 258\. Give 259 or more"),
        (261, {"rows": np.ones((1, 64))}, r"shape \(1, 64\); expected \(2, 64\)"),
        (261, {"head_rows": np.ones((2, 64))}, "head is its embedding"),
        (261, {"rows": np.full((2, 64), np.nan)}, "rows hold NaN or infinite values"),
        ("300", {}, "a tokenizer or a number"),
    ],
)
def test_sizes_and_rows_that_cannot_be_used(size, rows, message):
    model = tiny_model()
    model.tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match=message):
        resize_vocab(model, size, **rows)


def test_rows_to_spare_stay_and_go():
    model = tiny_model()
    with pytest.raises(ConfigError, match="packed for decode"):
        resize_vocab(pack_for_decode(model), 300)
    with pytest.raises(ConfigError, match="Give 259 or more"):
        resize_vocab(model, 258)  # without a tokenizer all ids are in use
    model.tokenizer = byte_tokenizer()
    larger = resize_vocab(model, 320)
    assert resize_vocab(larger, model.tokenizer).config.vocab_size == 320
    assert_trees_equal(resize_vocab(larger, 259).params, model.params)


def test_an_export_of_it_loads_in_stock_transformers(base_dir, tmp_path):
    import torch
    import transformers

    base = load_model(base_dir)
    base.tokenizer.add_tokens(["<|im_end|>"])
    save_hf(tmp_path / "out", resize_vocab(base, base.tokenizer))
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer("hi<|im_end|> there")["input_ids"]
    assert 259 in text and len(tokenizer) == stock.config.vocab_size == 260
    again = load_model(tmp_path / "out")
    with torch.no_grad():
        assert_logits_close(forward(again, ids(*text)), stock(torch.tensor([text])).logits.numpy())
