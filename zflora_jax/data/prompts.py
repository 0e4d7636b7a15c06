"""Prompt text and its tokens. Training and generation build the same prompt, token for token.

A prompt and its target are tokenised separately and joined, because generation sees the prompt
alone: in one string the last prompt token could merge with the first target token into a token that
the model is trained on but never conditioned on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.data.dates import pin_date

# LLM-Adapters' text, byte for byte: the lines after the header are indented by 16. Its training
# script (finetune.py) and its evaluation scripts (evaluate.py, commonsense_evaluate.py) differ in
# three places: the spaces that end the header, without and with an input, and the line between two
# sections.
_INDENT = " " * 16
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request."
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request."
)
# After the header without input, with input; between sections.
_WHITESPACE = {
    "alpaca": ("  ", " ", _INDENT),
    "alpaca-eval": (" ", "", ""),
}
STYLES = ("chat", *_WHITESPACE, "plain")


def _section(title: str, text: str) -> str:
    return f"{_INDENT}### {title}:\n{_INDENT}{text}"


def render(
    tokenizer: Any, prompt_style: str, instruction: str, input: str = "", date: str | None = None
) -> str:
    """Build the text that a model is given before its answer.

    "chat" is the tokenizer's chat template with one user turn and the header of the answer; an
    input follows the instruction after an empty line. "alpaca" is LLM-Adapters' prompt in the
    whitespace of its training script. "alpaca-eval" is the same in the whitespace of its evaluation
    scripts, which differs, so that a model meets a prompt that it was not trained on. "plain" is
    the instruction as it is, and the input after an empty line.

    Args:
      tokenizer: a Hugging Face tokenizer; only "chat" reads it.
      prompt_style: one of STYLES.
      instruction: the user's text, inserted as it is.
      input: more of the user's text, inserted as it is.
      date: the date that a chat template is told (data.date of a run); None: today.

    Raises:
      ConfigError: the style is unknown, or "chat" and the tokenizer has no chat template.
    """
    require(
        prompt_style in STYLES,
        f"unknown prompt style {prompt_style!r}: {nearest(prompt_style, STYLES)}.",
    )
    if prompt_style in _WHITESPACE:
        without, with_input, between = _WHITESPACE[prompt_style]
        sections = (
            [_section("Instruction", instruction)]
            + ([_section("Input", input)] if input else [])
            + [_section("Response", "")]
        )
        header = _ALPACA_INPUT + with_input if input else _ALPACA + without
        return f"{header}\n\n" + f"\n{between}\n".join(sections)
    text = f"{instruction}\n\n{input}" if input else instruction
    if prompt_style == "plain":
        return text
    return render_turns(tokenizer, [{"role": "user", "content": text}], date)


def render_turns(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    date: str | None = None,
    tools: Sequence[Any] = (),
    settings: Mapping[str, Any] | None = None,
    answered: bool = False,
) -> str:
    """Build the text that a model is given before it answers a conversation.

    Args:
      tokenizer: a Hugging Face tokenizer with a chat template.
      turns: {"role", "content"} of each turn.
      date: the date that the template is told; None: today.
      tools: that the template is told.
      settings: other arguments of the template.
      answered: whether the turns end with an answer, so that the header of one does not follow.

    Raises:
      ConfigError: the tokenizer has no chat template, or it refuses the turns.
    """
    given = {"tokenize": False, "add_generation_prompt": not answered} | dict(settings or {})
    return _applied(tokenizer, turns, date, tools, **given)


def marked_turns(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    date: str | None = None,
    tools: Sequence[Any] = (),
    settings: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """(Token ids of a conversation, 1 at each that the template marks as the assistant's, else 0.)
    Arguments and errors as for `render_turns`.
    """
    require(
        tokenizer.is_fast,
        f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell which tokens a chat"
        " template marks. Save the model's tokenizer as tokenizer.json.",
    )
    given = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = _applied(tokenizer, turns, date, tools, **(given | dict(settings or {})))
    return found["input_ids"], found["assistant_masks"]


def chat_template(tokenizer: Any, tools: Sequence[Any] = ()) -> str:
    """The chat template of a tokenizer; of several, the one for conversations with or without
    tools.

    Raises:
      ConfigError: it has none.
    """
    require(
        bool(getattr(tokenizer, "chat_template", None)),
        "prompt style 'chat' needs a tokenizer with a chat template and this one has none. Use an"
        " instruct model; or, to train, data.prompt_style='alpaca'; or, to generate, prompts as"
        " they are (--plain, chat=False).",
    )
    return tokenizer.get_chat_template(tools=list(tools) or None)


def _applied(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    date: str | None,
    tools: Sequence[Any],
    **options: Any,
) -> Any:
    template = chat_template(tokenizer, tools)
    template = template if date is None else pin_date(template, date)
    given = [dict(turn) for turn in turns]
    try:
        return tokenizer.apply_chat_template(
            given, chat_template=template, tools=list(tools) or None, **options
        )
    except (TemplateError, TypeError, ValueError) as error:
        advice = "give the turns as the template expects them, or use another template"
        if any(turn["role"] == "system" for turn in turns):
            advice += (
                "; a template without a system role takes that text at the start of the first user"
                " turn"
            )
        raise ConfigError(
            "the tokenizer's chat template refuses turns of"
            f" {', '.join(str(turn['role']) for turn in turns)}: {error}. Fix: {advice}."
        ) from error


def end_token(tokenizer: Any, prompt_style: str) -> int:
    """The id of the token that ends a target, at which generation stops.

    For "chat" it is the added token, special or not, that the template puts after an assistant turn
    (`<|im_end|>`, `<|eot_id|>`, ...), which in some models is not the EOS; without such a token or
    a template, and for the other styles, it is the tokenizer's EOS.

    Args:
      tokenizer: a Hugging Face tokenizer.
      prompt_style: one of STYLES.

    Raises:
      ConfigError: the tokenizer has neither.
    """
    if prompt_style == "chat" and getattr(tokenizer, "chat_template", None):
        marker = "zflora answer"
        turns = [
            {"role": "user", "content": "zflora question"},
            {"role": "assistant", "content": marker},
        ]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(marker)[2].lstrip()
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        # Not all_special_ids: tokens that only added_tokens_decoder lists are missing there, as
        # Llama 3's may be.
        if ids and ids[0] in {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}:
            return int(ids[0])
    require(
        tokenizer.eos_token_id is not None,
        "the tokenizer has no EOS token, so a model could not learn to stop. Set eos_token in its"
        " tokenizer_config.json.",
    )
    return int(tokenizer.eos_token_id)


def encode_prompt_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise rendered prompts.

    If the tokenizer starts texts with BOS, each has exactly one, even if a chat template writes it
    too.

    Args:
      tokenizer: a Hugging Face tokenizer.
      texts: of `render` or `render_turns`.
    """
    if not texts:
        return []
    return with_bos(tokenizer, tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def with_bos(tokenizer: Any, rows: list[list[int]]) -> list[list[int]]:
    """Token ids with exactly one BOS at the start, if the tokenizer starts texts with it."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][0] != bos:
        return rows
    return [row if row[:1] == [bos] else [bos, *row] for row in rows]


def encode(
    tokenizer: Any,
    prompt_style: str,
    prompts: Sequence[str],
    targets: Sequence[str],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokenise (rendered prompt, target) pairs.

    Args:
      tokenizer: a Hugging Face tokenizer.
      prompt_style: one of STYLES.
      prompts: of `render`.
      targets: one for each prompt.

    Returns:
      (tokens [n] int32, loss_mask [n] bool) per pair: the tokens of prompt and target and one
      `end_token`, never cut. The mask is True at the target and its end token. It is about the
      token at its own position; the loss shifts by one.

    Raises:
      ConfigError: there is not one target for each prompt.
    """
    if len(prompts) != len(targets):
        raise ConfigError(
            f"{len(prompts)} prompts and {len(targets)} targets: expected one target for each"
            " prompt."
        )
    if not prompts:
        return []
    end = end_token(tokenizer, prompt_style)
    if prompt_style == "plain":
        return _encode_plain(tokenizer, prompts, targets, end)
    target_ids = tokenizer(list(targets), add_special_tokens=False)["input_ids"]
    rows = []
    for prompt, target in zip(encode_prompt_texts(tokenizer, prompts), target_ids, strict=True):
        tokens = np.asarray([*prompt, *target, end], np.int32)
        rows.append((tokens, np.arange(len(tokens)) >= len(prompt)))
    return rows


def _encode_plain(
    tokenizer: Any, prompts: Sequence[str], targets: Sequence[str], end: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`encode` of texts, each with its target as one text: a tokenizer may write a space before a
    text of its own. What the target changes of the prompt's last tokens is learned, as TRL has it.
    """
    # Texts may end as the sequences will.
    pairs = zip(prompts, targets, strict=True)
    texts = [prompt + target.removesuffix(tokenizer.eos_token) for prompt, target in pairs]
    rows = []
    both = (encode_prompt_texts(tokenizer, x) for x in (prompts, texts))
    for prompt, text in zip(*both, strict=True):
        tokens = np.asarray([*text, end], np.int32)
        rows.append((tokens, np.arange(len(tokens)) >= common_prefix(prompt, text)))
    return rows


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two lists of token ids."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
