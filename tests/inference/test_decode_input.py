"""Decoding refuses prompts, texts and settings that it cannot use; keywords and the fields of a
config say the same.
"""

from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.models import tiny_model, untied

from zflora_jax import GenerationConfig, Sampler, generate, generate_tokens
from zflora_jax.core.fields import ConfigError

# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1, 2], []], {}, r"prompt 1 is empty: .*at least one token"),
        ([[1] * 505], {}, r"0 has 505 tokens; with max_new_tokens=8 that .*context of 512\."),
        ([[1], [2, 259]], {}, r"prompt 1 holds token ids outside 0\.\.258"),
        ([[-1]], {}, r"prompt 0 holds token ids outside 0\.\.258"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ([[1]], {"batch_size": 0}, "batch_size=0: must be at least 1"),
        ([[1, 2.5]], {}, r"prompt 0 must hold token ids, which are integers; got float64"),
        ([["a"]], {}, r"prompt 0 must hold token ids"),
        ("What?", {}, r"prompt 0 is 'W': expected a list of token ids.*takes a list of texts"),
        ([1, 2, 3], {}, r"prompt 0 is 1: expected a list of token ids"),
        ([[[1], [2, 3]]], {}, r"prompt 0 holds lists"),
        ([[1]], {"stop_token_ids": [259]}, r"stop_token_ids holds token ids outside 0\.\.258"),
        (None, {}, r"prompt 0 is None: expected a list of token ids"),
        ([[1]], {"max_new_token": 3}, "unknown key 'max_new_token' .*you mean 'max_new_tokens'"),
        ([[1]], {"stop_token_ids": 2}, r"stop_token_ids=2: expected a list of int, .* \[2\]"),
        ([[1]], {"seed": 1.5}, "seed=1.5: expected int, got float"),
        ([[1]], {"seed": 2**32}, r"seed=4294967296: must be from 0 to 2\*\*32 - 1"),
        ([[1]], {"sampler": 0.7}, "sampler=0.7: expected a table of Sampler fields"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_prompts_and_settings_are_refused(
    prompts: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_tokens(tiny_model(), prompts, **{"max_new_tokens": 8, **settings})


def test_texts_need_a_list_and_a_tokenizer() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"no tokenizer; use generate_tokens"):
        generate(model, ["hello"])
    model.tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"a list of texts, got 'hello'; one text goes in a list"):
        generate(model, "hello")
    with pytest.raises(ValueError, match=r"prompt 1 is empty"):
        generate(model, ["hello", ""], max_new_tokens=4)
    plain, chat = (
        generate(model, iter(["hello", "hi"]), max_new_tokens=4, chat=chat)
        for chat in (False, True)
    )
    assert len(plain) == len(chat) == 2 and plain != chat


def test_a_full_context_and_no_prompts_are_fine() -> None:
    model = tiny_model(max_position_embeddings=20)
    [answer] = generate_tokens(model, iter([[1] * 16]), max_new_tokens=4, stop_token_ids=())
    assert len(answer) == 4
    assert generate_tokens(model, [], max_new_tokens=4) == []


# --- settings as one value ------------------------------------------------------------------------


def test_keywords_are_fields_of_the_config_and_win_over_it() -> None:
    model, prompts = untied(), [[5, 6, 7], [100]]
    config = GenerationConfig(max_new_tokens=6, sampler=Sampler(2.0), seed=3, stop_token_ids=())
    want = generate_tokens(
        model, prompts, max_new_tokens=6, sampler=Sampler(2.0), seed=3, stop_token_ids=()
    )
    assert generate_tokens(model, prompts, config) == want
    assert generate_tokens(model, prompts, config, max_new_tokens=4) == [row[:4] for row in want]
    assert generate_tokens(model, prompts, config, seed=4) != want
    greedy = generate_tokens(model, prompts, max_new_tokens=6, stop_token_ids=())
    assert generate_tokens(model, prompts, config, sampler=None) == greedy != want
