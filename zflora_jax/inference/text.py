"""Text in, text out: generation in batches, streamed generation, a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.data.prompts import encode_prompt_texts, end_token, render, render_turns
from zflora_jax.inference.decode import generate_tokens, stream_tokens
from zflora_jax.inference.sampling import Sampler

Turn = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}


def stop_ids(model: Model, prompt_style: str) -> list[int]:
    """The ids that end an answer: a chat template's end of turn is not always the model's EOS, so
    either does.
    """
    return sorted({*model.config.eos_token_ids, end_token(model.tokenizer, prompt_style)})


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
    return tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=True)


def _tokenizer(model: Model) -> Any:
    require(
        model.tokenizer is not None,
        "this model has no tokenizer; use generate_tokens or stream_tokens with token ids.",
    )
    return model.tokenizer


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int = 16,
    num_beams: int = 1,
    chat: bool = False,
    date: str | None = None,
) -> list[str]:
    """Texts generated for text prompts, special tokens left out. Greedy unless a Sampler, or
    num_beams above 1 for beam search, is given.

    chat: wrap each prompt as a user turn in the tokenizer's chat template, as training with
    data.prompt_style="chat" does; without it a prompt is continued as it is. date: the day that the
    template is told, "2026-11-26" (data.date of the run that trained the model); None for today.
    Raises ConfigError for a model without a tokenizer, or chat without a chat template.
    """
    tokenizer = _tokenizer(model)
    require(not isinstance(prompts, str), "prompts is one string; pass a list of strings.")
    texts = (
        [render(tokenizer, "chat", prompt, date=date) for prompt in prompts]
        if chat
        else list(prompts)
    )
    stop = stop_ids(model, "chat") if chat else list(model.config.eos_token_ids)
    answers = generate_tokens(
        model,
        encode_prompt_texts(tokenizer, texts),
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        num_beams=num_beams,
        stop=stop,
    )
    return [answer_text(tokenizer, answer, stop) for answer in answers]


def stream(
    model: Model,
    prompt: str | Sequence[Turn],
    *,
    max_new_tokens: int = 256,
    sampler: Sampler | None = None,
    seed: int = 0,
    date: str | None = None,
) -> Iterator[str]:
    """The answer to one prompt, piece by piece as it is generated; together the pieces are the text
    that `generate` gives.

    prompt: a text, continued as it is, or the turns of a conversation, rendered by the tokenizer's
    chat template. A piece never ends within a character, so there may be fewer pieces than tokens.
    date, and what is raised: as for `generate`.
    """
    tokenizer = _tokenizer(model)
    chat = not isinstance(prompt, str)
    text = render_turns(tokenizer, prompt, date) if not isinstance(prompt, str) else prompt
    [ids] = encode_prompt_texts(tokenizer, [text])
    stop = stop_ids(model, "chat") if chat else list(model.config.eos_token_ids)
    given: list[int] = []
    said = ""
    for token in stream_tokens(
        model, ids, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed, stop=stop
    ):
        given.append(token)
        whole = answer_text(tokenizer, given, stop)
        if whole.startswith(said) and not whole.endswith(
            "\ufffd"
        ):  # the replacement character: bytes of a character that is not whole yet
            yield whole[len(said) :]
            said = whole
    rest = answer_text(tokenizer, given, stop)[len(said) :]
    if rest:
        yield rest


def converse(
    model: Model,
    lines: Iterable[str],
    say: Callable[[str], None],
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    sampler: Sampler | None = None,
    seed: int = 0,
    date: str | None = None,
) -> None:
    """A conversation: each of `lines` is a user's turn, its answer is said piece by piece, then
    "\\n". "/reset" forgets the turns, "/quit" ends.

    Turns that no longer fit the model's context are left out, oldest first, and that is said.
    KeyboardInterrupt ends an answer, not the conversation. date: as for `generate`.
    """
    tokenizer = _tokenizer(model)
    opening = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    for line in map(str.strip, lines):
        if line == "/quit":
            return
        if line == "/reset":
            turns = []
            say("(the conversation starts anew)\n")
            continue
        if not line:
            continue
        turns.append({"role": "user", "content": line})
        room, kept = model.config.max_position_embeddings - max_new_tokens, turns
        while (
            too_long := len(
                encode_prompt_texts(tokenizer, [render_turns(tokenizer, opening + kept, date)])[0]
            )
            > room
        ):
            if len(kept) == 1:
                break
            kept = kept[2:]
        if too_long:
            turns.pop()
            say(
                f"(that is too long: {max_new_tokens} new tokens leave {max(room, 0)} of the"
                f" context's {model.config.max_position_embeddings})\n"
            )
            continue
        left_out, turns = (len(turns) - len(kept)) // 2, kept
        if left_out:
            say(
                f"(the context of {model.config.max_position_embeddings} tokens is full: the"
                f" {left_out} oldest turns are left out)\n"
            )
        answer = ""
        try:
            for piece in stream(
                model,
                opening + turns,
                max_new_tokens=max_new_tokens,
                sampler=sampler,
                seed=seed + len(turns),
                date=date,
            ):
                answer += piece
                say(piece)
        except KeyboardInterrupt:
            say(" (stopped)")
        say("\n")
        turns.append({"role": "assistant", "content": answer})
