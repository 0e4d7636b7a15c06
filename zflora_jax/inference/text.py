"""Text in, text out: generation in batches, streamed generation, a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.data.prompts import encode_prompt_texts, end_token, render, render_turns
from zflora_jax.inference.decode import generate_tokens, stream_tokens
from zflora_jax.inference.generation_config import (
    GenerationConfig,
    GenerationSettings,
    generation_config,
)

Turn = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}
# Of streams and conversations, where nothing is given
LONG_ANSWER = GenerationConfig(max_new_tokens=256)
INCOMPLETE = "\ufffd"  # the replacement character: bytes of a character that is not whole yet


def stop_ids(model: Model, prompt_style: str) -> list[int]:
    """The ids that end an answer: a chat template's end of turn is not always the model's EOS, so
    either does.
    """
    return _drawn(model, {*model.config.eos_token_ids, end_token(model.tokenizer, prompt_style)})


def stop_as_trained(model: Model, prompt_style: str) -> Model:
    """`model`, with the token that ends an answer in `prompt_style` among those it stops at: fused
    and exported, it is to stop there too.
    """
    stop, end = model.config.eos_token_ids, end_token(model.tokenizer, prompt_style)
    return (
        model
        if end in stop
        else replace(model, config=model.config.replace(eos_token_ids=(*stop, end)))
    )


def answer_text(tokenizer: Any, answer: Sequence[int], stop: Sequence[int]) -> str:
    """The text of generated tokens, without the one that ended them and without special tokens. An
    end of turn that is an added token but not special would be left in by its tokenizer.
    """
    ended = len(answer) > 0 and answer[-1] in stop
    given = answer[:-1] if ended else answer
    # Old releases of transformers take spaces out of it otherwise.
    return tokenizer.decode(given, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _tokenizer(model: Model) -> Any:
    require(
        model.tokenizer is not None,
        "this model has no tokenizer; use generate_tokens or stream_tokens with token ids.",
    )
    return model.tokenizer


def _encoded(model: Model, texts: Sequence[str]) -> list[list[int]]:
    return encode_prompt_texts(_tokenizer(model), texts)


def _ends(model: Model, chat: bool) -> Sequence[int]:
    return stop_ids(model, "chat") if chat else _drawn(model, model.config.eos_token_ids)


def _drawn(model: Model, ids: Iterable[int]) -> list[int]:
    """Those of `ids` that the model can give: it may have no row for a tokenizer's last ones."""
    return sorted(i for i in ids if i < model.config.vocab_size)


def generate(
    model: Model,
    prompts: Sequence[str],
    config: GenerationConfig | None = None,
    *,
    chat: bool = False,
    date: str | None = None,
    **settings: Unpack[GenerationSettings],
) -> list[str]:
    """Generate texts for text prompts. Greedy, unless `config` or `settings` say otherwise.

    Args:
      model: base, fused or packed, with a tokenizer.
      prompts: texts.
      config: how to generate; None for the defaults of `GenerationConfig`.
      chat: wrap each prompt as a user turn in the tokenizer's chat template, as training with
        data.prompt_style="chat" does; without it a prompt is continued as it is.
      date: the day that the template is told, "2026-11-26" (data.date of the run that trained the
        model); None for today.
      settings: fields of `GenerationConfig`, in place of those of `config`.

    Returns:
      The text generated for each prompt, without special tokens.

    Raises:
      ConfigError: a model without a tokenizer, chat without a chat template, or what
        `generate_tokens` refuses.
    """
    tokenizer = _tokenizer(model)
    require(not isinstance(prompts, str), "prompts is one string; pass a list of strings.")
    texts = (
        [render(tokenizer, "chat", prompt, date=date) for prompt in prompts]
        if chat
        else list(prompts)
    )
    config = generation_config(config, settings).stopping_at(_ends(model, chat))
    answers = generate_tokens(model, _encoded(model, texts), config)
    return [answer_text(tokenizer, answer, config.stop_token_ids or ()) for answer in answers]


def stream(
    model: Model,
    prompt: str | Sequence[Turn],
    config: GenerationConfig | None = None,
    *,
    date: str | None = None,
    **settings: Unpack[GenerationSettings],
) -> Iterator[str]:
    """Generate the answer to one prompt, piece by piece as it comes.

    Args:
      model: base, fused or packed, with a tokenizer.
      prompt: a text, continued as it is, or the turns of a conversation, rendered by the
        tokenizer's chat template.
      config: how to generate; None for the defaults of `GenerationConfig`, and max_new_tokens=256.
      date: as for `generate`.
      settings: fields of `GenerationConfig`, in place of those of `config`.

    Yields:
      Pieces that together are the text that `generate` gives. A piece never ends within a
      character, so there may be fewer pieces than tokens. Where a model writes bytes that are no
      text, a later one may change how those before it are read; what was yielded stays.

    Raises:
      ConfigError: as for `generate`.
    """
    tokenizer = _tokenizer(model)
    chat = not isinstance(prompt, str)
    text = render_turns(tokenizer, prompt, date) if not isinstance(prompt, str) else prompt
    config = generation_config(config or LONG_ANSWER, settings).stopping_at(_ends(model, chat))
    given: list[int] = []
    said = ""
    for token in stream_tokens(model, _encoded(model, [text])[0], config):
        given.append(token)
        whole = answer_text(tokenizer, given, config.stop_token_ids or ())
        if not whole.endswith(INCOMPLETE):
            yield _behind(said, whole)
            said = whole
    whole = answer_text(tokenizer, given, config.stop_token_ids or ())
    if rest := _behind(said, whole):
        yield rest


def _behind(said: str, whole: str) -> str:
    """`whole` from where it goes on, or otherwise, than `said`."""
    same = (i for i, (a, b) in enumerate(zip(said, whole, strict=False)) if a != b)
    return whole[next(same, len(said)) :]


def converse(
    model: Model,
    lines: Iterable[str],
    say: Callable[[str], None],
    config: GenerationConfig | None = None,
    *,
    system: str | None = None,
    date: str | None = None,
    **settings: Unpack[GenerationSettings],
) -> None:
    """Hold a conversation: each line is a user's turn; "/reset" forgets the turns, "/quit" ends.

    KeyboardInterrupt ends an answer, not the conversation.

    Args:
      model: base, fused or packed, with a tokenizer that has a chat template.
      lines: what the user says.
      say: called with each piece of an answer, with a line feed after an answer, and with notes,
        e.g. that the oldest turns no longer fit the context and are left out.
      config: how to generate; None for the defaults of `GenerationConfig`, and max_new_tokens=256.
      system: text of the system turn; None for no such turn.
      date: as for `generate`.
      settings: fields of `GenerationConfig`, in place of those of `config`.

    Raises:
      ConfigError: as for `generate`.
    """
    _tokenizer(model)
    config = generation_config(config or LONG_ANSWER, settings)
    opening = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        if line == "/reset":
            turns = []
            say("(the conversation starts anew)\n")
        elif line:
            asked = [*turns, {"role": "user", "content": line}]
            kept = _turns_that_fit(model, opening, asked, config.max_new_tokens, say, date)
            if kept is None:
                continue
            seeded = replace(config, seed=config.seed + len(kept))
            answer = _say_answer(model, opening + kept, say, seeded, date)
            turns = [*kept, {"role": "assistant", "content": answer}]


def _turns_that_fit(
    model: Model,
    opening: list[dict[str, str]],
    turns: list[dict[str, str]],
    max_new_tokens: int,
    say: Callable[[str], None],
    date: str | None,
) -> list[dict[str, str]] | None:
    """The newest of `turns` that fit the context beside `opening` and the answer; None where not
    even the last does. What is left out is said.
    """
    limit = model.config.max_position_embeddings
    room, kept = limit - max_new_tokens, turns

    def too_long() -> bool:
        text = render_turns(_tokenizer(model), opening + kept, date)
        return len(_encoded(model, [text])[0]) > room

    while too_long():
        if len(kept) == 1:
            say(
                f"(that is too long: {max_new_tokens} new tokens leave {max(room, 0)} of the"
                f" context's {limit})\n"
            )
            return None
        kept = kept[2:]
    if left_out := (len(turns) - len(kept)) // 2:
        say(f"(the context of {limit} tokens is full: the {left_out} oldest turns are left out)\n")
    return kept


def _say_answer(
    model: Model,
    turns: list[dict[str, str]],
    say: Callable[[str], None],
    config: GenerationConfig,
    date: str | None,
) -> str:
    """The answer to `turns`, said piece by piece; as much of it as was said before an interrupt."""
    answer = ""
    try:
        for piece in stream(model, turns, config=config, date=date):
            answer += piece
            say(piece)
    except KeyboardInterrupt:
        say(" (stopped)")
    say("\n")
    return answer
