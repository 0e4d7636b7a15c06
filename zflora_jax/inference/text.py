"""Text in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import override, require
from zflora_jax.core.model import Model
from zflora_jax.core.trees import Tree
from zflora_jax.data.prompts import encode_prompt_texts, end_token, render
from zflora_jax.inference.batching import listed
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.inference.generation_config import GenerationConfig


def stop_ids(model: Model, prompt_style: str) -> list[int]:
    """Returns the ids that end an answer: the model's EOS and the chat template's end of a turn."""
    return _drawn(model, {*model.config.eos_token_ids, end_token(model.tokenizer, prompt_style)})


def stop_as_trained(model: Model, prompt_style: str) -> Model:
    """Returns `model` with the token that ends an answer in `prompt_style` among its EOS ids, so
    that it stops there after fusing and export too.
    """
    stop, end = model.config.eos_token_ids, end_token(model.tokenizer, prompt_style)
    if end in stop:
        return model
    return replace(model, config=model.config.replace(eos_token_ids=(*stop, end)))


def answer_text(tokenizer: Any, answer: Sequence[int], stop: Sequence[int]) -> str:
    """Decodes generated tokens without special tokens and the stop token, special or not."""
    ended = len(answer) > 0 and answer[-1] in stop
    given = answer[:-1] if ended else answer
    # Old releases of transformers would remove spaces.
    return tokenizer.decode(given, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _tokenizer(model: Model) -> Any:
    require(
        model.tokenizer is not None,
        "this model has no tokenizer; use generate_tokens with token ids.",
    )
    return model.tokenizer


def _ends(model: Model, chat: bool) -> Sequence[int]:
    return stop_ids(model, "chat") if chat else _drawn(model, model.config.eos_token_ids)


def _drawn(model: Model, ids: Iterable[int]) -> list[int]:
    """Returns the `ids` in the vocabulary, which may lack a tokenizer's last ones."""
    return sorted(i for i in ids if i < model.config.vocab_size)


def generate(
    model: Model,
    prompts: Iterable[str],
    config: GenerationConfig | None = None,
    *,
    chat: bool = False,
    date: str | None = None,
    adapter: AdapterConfig | None = None,
    adapters: Tree | None = None,
    **settings: Any,
) -> list[str]:
    """Generates texts for text prompts; greedily, unless `config` or `settings` have a sampler.

    Args:
      model: A base, fused or packed model with a tokenizer.
      prompts: Texts to answer or to continue.
      config: Settings of generation; None for the defaults of `GenerationConfig`.
      chat: Whether each prompt becomes a user turn in the tokenizer's chat template, as in training
        with data.prompt_style="chat"; otherwise the model continues the prompt as it is.
      date: The day given to the template, "2026-11-26" (data.date of the run that trained the
        model); None for today.
      adapter: The config of `adapters`.
      adapters: An unmerged adapter tree, see `generate_tokens`.
      settings: Fields of `GenerationConfig` that replace those of `config`.

    Returns:
      The text generated for each prompt, without special tokens.

    Raises:
      ConfigError: The model has no tokenizer, or no chat template for `chat`; or an error of
        `generate_tokens`.
    """
    tokens = encode_prompts(model, prompts, chat=chat, date=date)
    config = override(config or GenerationConfig(), settings).stopping_at(_ends(model, chat))
    answers = generate_tokens(model, tokens, config, adapter=adapter, adapters=adapters)
    stop = config.stop_token_ids or ()
    return [answer_text(model.tokenizer, answer, stop) for answer in answers]


def encode_prompts(
    model: Model, prompts: Iterable[str], *, chat: bool = False, date: str | None = None
) -> list[list[int]]:
    """Returns the token ids that `generate` gives the model for the same arguments."""
    tokenizer, texts = _tokenizer(model), listed(prompts)
    wrong = [prompts] if isinstance(prompts, str) else [p for p in texts if not isinstance(p, str)]
    require(
        not wrong,
        f"prompts must be a list of texts, got {[*wrong, ''][0]!r:.80}; one text goes in a list.",
    )
    texts = [render(tokenizer, "chat", text, date=date) for text in texts] if chat else texts
    return encode_prompt_texts(tokenizer, texts)
