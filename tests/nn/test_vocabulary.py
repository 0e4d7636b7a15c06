"""Tokens that the embedding has no row for are refused where they enter; resize_vocab gives them
one.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close, assert_trees_equal
from support.models import tiny_model

from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core import trees
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import DataConfig, MeshConfig
from zflora_jax.data.encoding import tokenize_examples
from zflora_jax.data.tasks import Example
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.train import train
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
OF_ANOTHER = r"outside 0\.\.258: is this the model's own tokenizer"


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
    """Before anything is trained or claimed."""
    base = load_base(run)
    base.tokenizer = wider_tokenizer()
    said = r"tokens were changed \(see zf\.resize_vocab\)"
    with pytest.raises(ConfigError, match=said):
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
    said = r"259 \('\[PAD\]'\).*tokenizer\.pad_token = tokenizer\.eos_token"
    with pytest.raises(ConfigError, match=said):
        tokenize_examples(examples, tokenizer, DataConfig(), 259)
    assert tokenize_examples(examples, tokenizer, DataConfig(), 260).pad_id == 259


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model: forward(model, ids(1, 259)), REFUSED),
        (lambda model: forward(model, jnp.asarray([[1, 259]])), REFUSED),
        (lambda model: generate_tokens(model, [[1, 259]], max_new_tokens=2), REFUSED),
        (lambda model: next(stream_tokens(model, [1, 259], max_new_tokens=2)), REFUSED),
        (lambda model: generate(model, ["hi"], chat=True, max_new_tokens=2), REFUSED),
        (lambda model: option_log_likelihoods(model, [[1]], [[[2], [259]]]), REFUSED),
        (lambda model: forward(model, ids(1, 260)), OF_ANOTHER),
        (lambda model: forward(model, ids(-1, 2)), OF_ANOTHER),
    ],
)
def test_use_of_a_token_without_a_row_is_refused(use, message, model):
    with pytest.raises(ConfigError, match=message):
        use(model)


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
    shapes = {n: x.shape for n, x in trees.flatten(wider.params).items()}
    assert shapes == param_shapes(wider.config)
    assert model.config.vocab_size == 259 and model.tokenizer is None  # left as it is
    for name, axis in (("embed/embedding", 0), ("lm_head/kernel", 1)):
        if name in shapes:
            mean = np.asarray(trees.flatten(model.params)[name], np.float64).mean(axis)
            new = np.take(np.asarray(trees.flatten(wider.params)[name]), 259, axis)
            np.testing.assert_allclose(new, mean, rtol=1e-5, atol=1e-6)
    back = resize_vocab(Model(wider.config, wider.params), 260)
    assert_trees_equal(back.params, wider.params)
    logits = forward(wider, tokens)
    assert_logits_close(logits[..., :259], forward(model, tokens))
    assert np.isfinite(forward(wider, ids(259, 1))).all()


def test_on_a_mesh():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    model = tiny_model(vocab_size=260, tie_word_embeddings=False)
    divided = dataclasses.replace(model, params=shard(model.params, mesh))
    wider = resize_vocab(divided, 264)
    table = wider.params["embed"]["embedding"]
    assert table.sharding.spec == divided.params["embed"]["embedding"].sharding.spec
    assert {part.data.shape for part in table.addressable_shards} == {(132, 32)}
    found = trees.flatten(wider.params)
    for name, leaf in trees.flatten(resize_vocab(model, 264).params).items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-6, atol=1e-6, err_msg=name)


def test_rows_to_spare_stay_and_go():
    model = tiny_model()
    for given, size, message in (
        (model, "300", "a tokenizer or a number"),
        (model, 258, "Give 259 or more"),  # without a tokenizer all ids are in use
        (pack_for_decode(model), 300, "packed for decode"),
    ):
        with pytest.raises(ConfigError, match=message):
            resize_vocab(given, size)
    model.tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match=r"the largest is 258\. Give 259 or more"):
        resize_vocab(model, 258)
    larger = resize_vocab(model, 320)
    assert resize_vocab(larger, model.tokenizer).config.vocab_size == 320
    assert_trees_equal(resize_vocab(larger, 259).params, model.params)
