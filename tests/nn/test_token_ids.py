"""Tokens that the embedding has no row for are refused where they enter."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.models import tiny_model

from zflora_jax import ConfigError, Model, forward, generate, load_base, override, save_hf, train
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.encoding import tokenize_examples
from zflora_jax.data.tasks import Example
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.inference.likelihood import option_log_likelihoods

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|im_end|>' }}{% endfor %}{%"
    " if add_generation_prompt %}[assistant]{% endif %}"
)
REFUSED = (
    r"token ids outside 0\.\.258: 259 \('<\|im_end\|>'\).*no embedding.*resize_token_embeddings"
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


def test_training_data_beyond_the_embedding_is_refused(run, tmp_path):
    """Before anything is trained or claimed."""
    base = load_base(run)
    base.tokenizer = wider_tokenizer()
    said = "tokens were changed"
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
        (lambda model: generate(model, ["hi"], chat=True, max_new_tokens=2), REFUSED),
        (lambda model: option_log_likelihoods(model, [[1]], [[[2], [259]]]), REFUSED),
        (lambda model: forward(model, ids(1, 260)), OF_ANOTHER),
        (lambda model: forward(model, ids(-1, 2)), OF_ANOTHER),
    ],
)
def test_use_of_a_token_without_a_row_is_refused(use, message, model):
    with pytest.raises(ConfigError, match=message):
        use(model)
