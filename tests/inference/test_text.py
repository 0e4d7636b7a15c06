"""Streams say what batch generation says, a character at a time at the least."""

from typing import Any

import jax
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.grids import always
from support.models import perturb, untied

from zflora_jax import AdapterConfig, ConfigError, Model, Sampler, generate, init_adapters, stream
from zflora_jax.adapters.fuse import fuse
from zflora_jax.inference.decode import generate_tokens, stream_tokens
from zflora_jax.inference.program import DecodeProgram

PROMPT = "Once upon"
SAMPLERS = [None, Sampler(0.9), Sampler(1.5, 20, 0.9)]


@pytest.fixture(scope="module")
def talker() -> Any:
    model = untied(max_position_embeddings=128)
    model.tokenizer = byte_tokenizer()
    return model


@pytest.mark.parametrize(
    ("count", "sampler"),
    always(
        [(count, sampler) for count in (13, 2, 1) for sampler in SAMPLERS],
        lambda case: case == (13, SAMPLERS[2]),
    ),
    ids=str,
)
def test_streamed_tokens_are_those_of_a_batch_of_one(talker, sampler, count):
    for prompt in ([5, 6, 7], list(range(1, 40))):
        settings = {"max_new_tokens": count, "sampler": sampler, "seed": 3}
        [want] = generate_tokens(talker, [prompt], **settings)
        assert list(stream_tokens(talker, prompt, **settings)) == want and len(want) == count


def test_a_stream_ends_with_its_stop_token(talker):
    whole = generate_tokens(talker, [[5, 6, 7]], max_new_tokens=12)[0]
    stop = whole[5]
    want = whole[: whole.index(stop) + 1]
    assert list(stream_tokens(talker, [5, 6, 7], max_new_tokens=12, stop_token_ids=[stop])) == want


def test_a_stream_compiles_one_step(talker):
    list(stream_tokens(talker, [5, 6, 7], max_new_tokens=9))
    programs = DecodeProgram.prefill, DecodeProgram.decode_until
    compiled = [program._cache_size() for program in programs]
    # As much room, and as long a prompt once padded.
    list(stream_tokens(talker, [8, 9, 10, 11], max_new_tokens=16))
    assert [program._cache_size() for program in programs] == compiled


def test_a_stop_token_that_the_model_cannot_give_stops_nothing(talker):
    """A tokenizer may end with tokens that the embedding has no row for."""
    config = talker.config.replace(eos_token_ids=(*talker.config.eos_token_ids, 300))
    more = Model(config, talker.params, talker.tokenizer)
    want = generate(talker, [PROMPT], max_new_tokens=8)
    assert generate(more, [PROMPT], max_new_tokens=8) == want


@pytest.mark.parametrize("chat", [False, True])
def test_pieces_together_are_the_generated_text(talker, chat):
    pieces = list(
        stream(
            talker,
            iter([{"role": "user", "content": PROMPT}]) if chat else PROMPT,
            max_new_tokens=24,
            sampler=Sampler(1.0),
            seed=4,
        )
    )
    want = generate(talker, [PROMPT], max_new_tokens=24, sampler=Sampler(1.0), seed=4, chat=chat)
    assert ["".join(pieces)] == want and len(pieces) > 3 and all(pieces)


def test_a_piece_never_ends_within_a_character(talker, monkeypatch):
    text, tokens_of = "aé€😀b", "zflora_jax.inference.text.stream_tokens"
    monkeypatch.setattr(tokens_of, lambda *_, **__: iter(text.encode()))
    assert list(stream(talker, PROMPT)) == list(text)
    monkeypatch.setattr(tokens_of, lambda *_, **__: iter("é".encode()[:1]))
    assert list(stream(talker, PROMPT)) == ["�"]  # cut there by max_new_tokens


def test_a_stream_goes_on_where_bytes_change_what_is_before_them(talker, monkeypatch):
    """As decoders that read bytes in runs do: what was said stays, and the rest is as it ends."""
    texts = ["a", "a\n", "a��", "a��b", "a��b c"]
    monkeypatch.setattr("zflora_jax.inference.text.stream_tokens", lambda *_, **__: range(5))
    monkeypatch.setattr(
        "zflora_jax.inference.text.answer_text", lambda _, given, __: texts[len(given) - 1]
    )
    assert list(stream(talker, PROMPT)) == ["a", "\n", "��b", " c"]


def test_an_adapter_beside_the_base_answers_as_fused(talker):
    adapter = AdapterConfig("zflora-minimal", rank=4)
    adapters = perturb(init_adapters(jax.random.key(0), talker, adapter), std=0.5)
    told: dict[int, str] = {}
    found = generate(
        talker,
        [PROMPT, "hi"],
        adapter=adapter,
        adapters=adapters,
        max_new_tokens=8,
        on_answer=told.__setitem__,
    )
    assert found == generate(fuse(talker, adapter, adapters), [PROMPT, "hi"], max_new_tokens=8)
    assert found != generate(talker, [PROMPT, "hi"], max_new_tokens=8)
    assert told == dict(enumerate(found))


def test_what_cannot_be_said_is_refused(talker):
    without = untied()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        next(stream(without, PROMPT))
    with pytest.raises(ConfigError, match=r"a list of turns.*one text goes without a list"):
        next(stream(talker, ["hi"]))  # type: ignore[list-item]
    for wrong in (None, [None], 5, [5]):
        with pytest.raises(ConfigError, match=r"a list of texts, got (5|None); one text goes in"):
            generate(talker, wrong)
    without.tokenizer = byte_tokenizer(chat_template=None)
    with pytest.raises(ConfigError, match="chat template"):
        next(stream(without, [{"role": "user", "content": "hi"}]))
