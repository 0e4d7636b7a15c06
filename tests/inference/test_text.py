"""Generation from text to text."""

from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.models import untied

from zflora_jax import ConfigError, Model, generate

PROMPT = "Once upon"


@pytest.fixture(scope="module")
def talker() -> Any:
    model = untied(max_position_embeddings=128)
    model.tokenizer = byte_tokenizer()
    return model


def test_a_stop_token_that_the_model_cannot_give_stops_nothing(talker):
    """A tokenizer may end with tokens that the embedding has no row for."""
    config = talker.config.replace(eos_token_ids=(*talker.config.eos_token_ids, 300))
    more = Model(config, talker.params, talker.tokenizer)
    want = generate(talker, [PROMPT], max_new_tokens=8)
    assert generate(more, [PROMPT], max_new_tokens=8) == want


def test_what_cannot_be_said_is_refused(talker):
    without = untied()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        generate(without, [PROMPT])
    for wrong in (None, [None], 5, [5]):
        with pytest.raises(ConfigError, match=r"a list of texts, got (5|None); one text goes in"):
            generate(talker, wrong)
    without.tokenizer = byte_tokenizer(chat_template=None)
    with pytest.raises(ConfigError, match="chat template"):
        generate(without, [PROMPT], chat=True)
