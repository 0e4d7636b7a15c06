"""Chat templates in the manner of model families, with and without generation marks, and rows."""

from __future__ import annotations

import re

from support.byte_tokenizer import byte_tokenizer
from support.tasks import load, write
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.encoding import tokenize_examples

_MARKS = re.compile(r"\{%-? (end)?generation -?%\}")

# As Qwen2.5 has it: a system turn of its own where none is given.
CHATML = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\nBe kind.<eos>\n' -}}"
    "{%- endif -%}"
    "{%- if tools -%}{{- 'tools: ' + tools | tojson + '\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content + '<eos>\n' -}}"
    "{%- endgeneration -%}{%- else -%}{{- m.content + '<eos>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# As Llama 3 has it: texts are trimmed, and the template writes BOS.
LLAMA = (
    "{{- bos_token -}}{%- for m in messages -%}{{- '[' + m.role + ']\n\n' -}}"
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content | trim + '<eos>' -}}"
    "{%- endgeneration -%}{%- else -%}{{- m.content | trim + '<eos>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '[assistant]\n\n' -}}{%- endif -%}"
)
# As Gemma has it: no system turn, and roles take turns.
GEMMA = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{%- endif -%}"
    "{{- '<turn>' + m.role + '\n' -}}{%- if m.role == 'assistant' -%}{%- generation -%}"
    "{{- m.content + '<eos>\n' -}}{%- endgeneration -%}{%- else -%}{{- m.content + '<eos>\n' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<turn>assistant\n' -}}{%- endif -%}"
)
# As Qwen3 has it: only the last answer shows a block of thoughts.
THINKING = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{{- m.content + '<eos>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


# As gpt-oss has it: answers in the middle end with another token than the last one.
CHANNELS = (
    "{%- for m in messages -%}{{- '<start>' + m.role + ': ' + m.content -}}"
    "{{- '<eos>' if loop.last and m.role == 'assistant' else '<pad>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start>assistant: ' -}}{%- endif -%}"
)


def unmarked(template: str) -> str:
    """A template without its generation marks."""
    return _MARKS.sub("", template)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SHORT = [turn("user", "Hello"), turn("assistant", "Hi!")]
LONG = [
    turn("user", "What is 2 + 2?"),
    turn("assistant", "It is 4."),
    turn("user", "And 3 + 3, in \u4e2d\u6587?"),
    turn("assistant", "\u516d\u3002"),
]
WITH_SYSTEM = [turn("system", "Be short."), *LONG]


ROOM = DataConfig(bucket_lengths=(1024,))


def rows_of(tmp_path, *rows, template=CHATML, data=ROOM, **tokenizer):
    """(The tokenizer, its sequences of rows in a file, in their order.)"""
    write(tmp_path / "test.jsonl", *rows)
    examples = load("rows", "test", tmp_path)
    tokenizer = byte_tokenizer(chat_template=template, **tokenizer)
    return tokenizer, tokenize_examples(examples, tokenizer, data)


def messages(*conversations):
    return [{"messages": turns} for turns in conversations]
