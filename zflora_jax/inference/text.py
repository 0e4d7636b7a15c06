"""Text in, text out: generation in batches, streamed generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import override, require
from zflora_jax.core.model import Model
from zflora_jax.core.trees import Tree
from zflora_jax.data.prompts import encode_prompt_texts, end_token, render, render_turns
from zflora_jax.inference.decode import generate_tokens, stream_tokens
from zflora_jax.inference.generation_config import GenerationConfig

Turn = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}
# Of streams, where nothing is given
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
    adapter: AdapterConfig | None = None,
    adapters: Tree | None = None,
    on_answer: Callable[[int, str], None] | None = None,
    **settings: Any,
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
      adapter, adapters: of an adapter to run beside the base, as for `generate_tokens`.
      on_answer: called with the number and the text of each answer as soon as its batch is done.
      settings: fields of `GenerationConfig`, in place of those of `config`.

    Returns:
      The text generated for each prompt, without special tokens.

    Raises:
      ConfigError: a model without a tokenizer, chat without a chat template, or what
        `generate_tokens` refuses.
    """
    tokens = encode_prompts(model, prompts, chat=chat, date=date)
    config = override(config or GenerationConfig(), settings).stopping_at(_ends(model, chat))

    def text(answer: Sequence[int]) -> str:
        return answer_text(model.tokenizer, answer, config.stop_token_ids or ())

    def tell(i: int, answer: Sequence[int]) -> None:
        if on_answer:
            on_answer(i, text(answer))

    answers = generate_tokens(
        model, tokens, config, adapter=adapter, adapters=adapters, on_answer=tell
    )
    return [text(answer) for answer in answers]


def encode_prompts(
    model: Model, prompts: Sequence[str], *, chat: bool = False, date: str | None = None
) -> list[list[int]]:
    """The token ids that `generate` gives a model for text prompts; arguments as for `generate`."""
    tokenizer = _tokenizer(model)
    wrong = next((p for p in prompts if not isinstance(p, str)), None)
    require(
        not isinstance(prompts, str) and wrong is None,
        f"prompts must be a list of texts, got {prompts if wrong is None else wrong!r:.80}; one"
        " text goes in a list, and turns of a conversation to `stream`.",
    )
    texts = [render(tokenizer, "chat", text, date=date) for text in prompts] if chat else prompts
    return encode_prompt_texts(tokenizer, list(texts))


def stream(
    model: Model,
    prompt: str | Sequence[Turn],
    config: GenerationConfig | None = None,
    *,
    date: str | None = None,
    **settings: Any,
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
    require(
        isinstance(prompt, str) or all(isinstance(turn, Mapping) for turn in prompt),
        f"prompt must be a text or a list of turns with role and content, got {prompt!r:.80}; one"
        " text goes without a list.",
    )
    text = render_turns(tokenizer, prompt, date) if not isinstance(prompt, str) else prompt
    config = override(config or LONG_ANSWER, settings).stopping_at(_ends(model, chat))
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
