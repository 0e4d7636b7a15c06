"""Prompt text and its tokens. Training and generation build the same prompt, token for token.

Prompt and target are tokenised separately and joined. In one string, the last prompt token could
merge with the first target token into one that generation never starts from.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from zflora_jax.core.fields import ConfigError, require, require_in
from zflora_jax.data.dates import pin_date

# LLM-Adapters' text, byte for byte. Its training and its evaluation scripts differ in the spaces
# that end the header, without and with an input, and in the line between two sections.
_INDENT = " " * 16
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes"
    " the request."
)
_PAIRED = ", paired with an input that provides further context"
_WHITESPACE = {"alpaca": ("  ", " ", _INDENT), "alpaca-eval": (" ", "", "")}
STYLES = ("chat", *_WHITESPACE, "plain")


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns the length of the common prefix of two texts, or lists of token ids or turns."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def render(
    tokenizer: Any, prompt_style: str, instruction: str, input: str = "", date: str | None = None
) -> str:
    """Builds the text of a prompt, up to the model's answer.

    "chat" is the tokenizer's chat template with one user turn and the header of the answer.
    "alpaca" and "alpaca-eval" are LLM-Adapters' prompt in the whitespace of its training and of its
    evaluation scripts. "plain" is the instruction as it is.

    Args:
      tokenizer: A Hugging Face tokenizer; only "chat" reads it.
      prompt_style: One of STYLES.
      instruction: The user's text.
      input: More of the user's text: a section in alpaca, else it follows after an empty line.
      date: Today's date for a chat template (data.date of a run); None for today.

    Raises:
      ConfigError: The style is unknown, or "chat" and the tokenizer has no chat template.
    """
    require_in(STYLES, prompt_style, f"unknown prompt style {prompt_style!r}")
    if prompt_style in _WHITESPACE:
        without, with_input, between = _WHITESPACE[prompt_style]
        header = _ALPACA.format(_PAIRED if input else "") + (with_input if input else without)
        parts = [("Instruction", instruction), ("Input", input), ("Response", "")]
        parts = parts if input else parts[::2]
        sections = (f"{_INDENT}### {name}:\n{_INDENT}{text}" for name, text in parts)
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
    **options: Any,
) -> Any:
    """Builds the text of a conversation, up to the model's answer.

    Args:
      tokenizer: A Hugging Face tokenizer with a chat template.
      turns: The turns, each {"role", "content"}.
      date, tools: Values for the template; None for today's date.
      options: Other arguments of the template or of apply_chat_template.

    Raises:
      ConfigError: The tokenizer has no chat template, or it refuses the turns.
    """
    template = chat_template(tokenizer, tools)
    template = template if date is None else pin_date(template, date)
    options = {"tokenize": False, "add_generation_prompt": True} | options
    try:
        return tokenizer.apply_chat_template(
            list(map(dict, turns)), chat_template=template, tools=list(tools) or None, **options
        )
    except Exception as error:  # a template may fail in any way
        raise ConfigError(
            f"the tokenizer's chat template refuses turns of"
            f" {', '.join(str(turn.get('role')) for turn in turns)}: {type(error).__name__}:"
            f" {error}. Give the turns as it expects them (the text of a system turn can stand at"
            " the start of the first user turn), or use another template."
        ) from error


def chat_template(tokenizer: Any, tools: Sequence[Any] = ()) -> str:
    """Returns the chat template for `tools`, if any; ConfigError if there is none."""
    require(
        bool(getattr(tokenizer, "chat_template", None)),
        "prompt style 'chat' needs a tokenizer with a chat template and this one has none. Use an"
        " instruct model, data.prompt_style='alpaca', or prompts as they are (--plain).",
    )
    try:
        return tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError as error:  # several by name, and none of the name that is needed
        raise ConfigError(f"the tokenizer has no chat template for this: {error}") from error


def require_settings(tokenizer: Any, tools: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for chat_template_kwargs that the template does not read, and for
    arguments of apply_chat_template, which change the rendering and its form.
    """
    for name in settings:
        arguments = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
        arguments -= {"documents"}
        require(
            name not in arguments,
            f"chat_template_kwargs has {name!r}, an argument of the renderer and no variable of a"
            f" template. Leave it out{', and give tools in a column' * (name == 'tools')}.",
        )
        known = _variables(chat_template(tokenizer, tools)) - arguments
        require(
            name in known or settings[name] in ("", [], {}),
            f"the tokenizer's chat template does not read {name!r} of chat_template_kwargs. It"
            f" reads {', '.join(sorted(known)) or 'none'}.",
        )


@lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    """Returns the names that a template reads and does not set."""
    from jinja2 import Environment, meta

    unmarked = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    parsed = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(unmarked)
    return frozenset(meta.find_undeclared_variables(parsed))


def end_token(tokenizer: Any, prompt_style: str) -> int:
    """Returns the id of the token that ends a target and stops generation. For "chat" it is the
    added token that the template puts after an assistant turn (`<|im_end|>`, `<|eot_id|>`, ...),
    which may differ from the EOS; else the tokenizer's EOS. ConfigError if there is none.
    """
    if prompt_style == "chat" and getattr(tokenizer, "chat_template", None):
        marker, question = "zflora answer", {"role": "user", "content": "zflora question"}
        turns = [question, {"role": "assistant", "content": marker}]
        try:
            text = render_turns(tokenizer, turns, add_generation_prompt=False)
        except ConfigError:  # some need a system turn
            turns = [{"role": "system", "content": "zflora system"}, *turns]
            text = render_turns(tokenizer, turns, add_generation_prompt=False)
        after = text.rpartition(marker)[2].lstrip()
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in added_tokens(tokenizer):
            return int(ids[0])
    require(
        tokenizer.eos_token_id is not None,
        "the tokenizer has no EOS token, so a model could not learn to stop. Set eos_token in its"
        " tokenizer_config.json.",
    )
    return int(tokenizer.eos_token_id)


def added_tokens(tokenizer: Any) -> set[int]:
    """Returns the ids of added tokens; all_special_ids may lack some, e.g. Llama 3's."""
    return {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def encode_prompt_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenises texts of `render` or `render_turns`. Each has exactly one BOS if the tokenizer
    starts texts with it, even if a chat template writes it too.
    """
    if not texts:
        return []
    return with_bos(tokenizer, tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def with_bos(tokenizer: Any, rows: list[list[int]]) -> list[list[int]]:
    """Returns token ids with one BOS at the start, if the tokenizer starts texts with it."""
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][0] != bos:
        return rows
    return [row if row[:1] == [bos] else [bos, *row] for row in rows]
