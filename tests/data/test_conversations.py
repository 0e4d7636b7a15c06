"""Conversations: the tokens are the template's, the loss is on what the assistant says, and what
cannot be read or learned is said. That TRL makes the same: test_trl.py.
"""

import numpy as np
import pytest
from support.byte_tokenizer import BOS, byte_tokenizer
from support.chat import (
    CHANNELS,
    CHATML,
    GEMMA,
    LLAMA,
    LONG,
    ROOM,
    SHORT,
    THINKING,
    WITH_SYSTEM,
    messages,
    rows_of,
    turn,
    unmarked,
)
from support.tasks import load, write

from zflora_jax import ConfigError, DataConfig
from zflora_jax.data import encoding
from zflora_jax.data.encoding import encode_examples, encode_prompts, tokenize_examples
from zflora_jax.data.tasks import Example
from zflora_jax.evaluation.contamination import contaminated, question, questions


def trained(tokenizer, row):
    """The texts of the runs of tokens that are learned."""
    changes = np.flatnonzero(np.diff(row.loss_mask.astype(int))) + 1
    parts = np.split(np.arange(len(row.tokens)), changes)
    return [tokenizer.decode(row.tokens[p]) for p in parts if row.loss_mask[p[0]]]


# --- what is learned ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, LLAMA, GEMMA], ids=["chatml", "llama", "gemma"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_marks_and_prefixes_give_the_same(template, add_bos, tmp_path):
    conversations = [SHORT, LONG] if template == GEMMA else [SHORT, LONG, WITH_SYSTEM]
    rows = messages(*conversations)
    tokenizer, marked = rows_of(tmp_path, *rows, template=template, add_bos=add_bos)
    _, by_prefix = rows_of(tmp_path, *rows, template=unmarked(template), add_bos=add_bos)
    assert unmarked(template) != template
    for a, b, turns in zip(marked.rows, by_prefix.rows, conversations, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
        said = [t["content"] for t in turns if t["role"] == "assistant"]
        end = "<eos>" if template == LLAMA else "<eos>\n"
        assert trained(tokenizer, a) == [f"{text}{end}" for text in said]
        assert (a.tokens == BOS).sum() == (add_bos or template == LLAMA) == (a.tokens[0] == BOS)


def test_an_answer_that_is_written_in_another_way_when_more_follows(tmp_path):
    """Only the last one has its block of thoughts, as the model will write it."""
    tokenizer, encoded = rows_of(tmp_path, *messages(LONG), template=THINKING)
    said = trained(tokenizer, encoded.rows[0])
    assert said == ["It is 4.<eos>", "<think>\n\n</think>\n\n\u516d\u3002<eos>\n"]


def test_the_prompt_of_an_answer_is_what_training_put_before_it(tmp_path):
    for template in (CHATML, unmarked(CHATML), LLAMA):
        write(tmp_path / "test.jsonl", *messages(WITH_SYSTEM, SHORT))
        examples = load("rows", "test", tmp_path)
        tokenizer = byte_tokenizer(chat_template=template)
        encoded = tokenize_examples(examples, tokenizer, ROOM)
        prompts = encode_prompts(examples, tokenizer, "chat")
        for prompt, row in zip(prompts, encoded.rows, strict=True):
            answer = np.flatnonzero(row.loss_mask)[-1]
            start = np.flatnonzero(~row.loss_mask[:answer])[-1] + 1
            assert prompt == row.tokens[:start].tolist()
    assert examples[0].prompt == LONG[2]["content"] and examples[0].target == LONG[3]["content"]


def test_texts_are_taken_as_they_are(tmp_path):
    tokenizer, encoded = rows_of(tmp_path, {"text": "Once."}, {"text": "Ends<eos>"}, add_bos=True)
    texts = [tokenizer.decode(row.tokens) for row in encoded.rows]
    assert texts == ["<bos>Once.<eos>", "<bos>Ends<eos>"]
    assert [trained(tokenizer, row) for row in encoded.rows] == [[t[5:]] for t in texts]
    with pytest.raises(ConfigError, match="a row has no prompt"):
        encode_prompts(load("rows", "test", tmp_path), tokenizer, "chat")
    # A completion that merges with its prompt is learned from the token on that both share.
    path = write(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cd"})
    tokenizer = byte_tokenizer(pair="bc")
    (row,) = tokenize_examples(load("rows", "train", path), tokenizer, ROOM).rows
    assert tokenizer.convert_ids_to_tokens(row.tokens.tolist()) == ["a", "bc", "d", "<eos>"]
    assert row.loss_mask.tolist() == [False, True, True, True]


def test_what_a_template_is_told_beside_the_turns(tmp_path):
    tools = {"messages": SHORT, "tools": [{"name": "add"}]}
    both = {"default": CHATML, "tool_use": CHATML.replace("tools: ", "functions: ")}
    for template, row, said in (
        (CHATML, tools, 'tools: [{"name": "add"}]'),
        (both, tools, "functions: "),
        (both, {"messages": SHORT}, "<|im_start|>user\nHello"),
    ):
        tokenizer, encoded = rows_of(tmp_path, row, template=template)
        text = tokenizer.decode(encoded.rows[0].tokens)
        assert said in text and ("functions" in text) == (said == "functions: ")
    named = turn("tool", "4") | {"name": "add", "tool_call_id": "1", "toxic": False}  # metadata
    rows_of(tmp_path, *messages([SHORT[0], named, SHORT[1]]), template=CHATML)
    with pytest.raises(ConfigError, match=r"row 1: .* leaves out the tools"):
        rows_of(tmp_path, tools, template=LLAMA)
    mood = CHATML.replace("Be kind.<eos>", "' + mood | join(' ') + '<eos>")
    mood_of = {"mood": ["Be merry.", "Be brief."], "custom": None, "python_tools": []}
    row = {"messages": SHORT, "chat_template_kwargs": mood_of}
    for template in (mood, unmarked(mood)):
        tokenizer, encoded = rows_of(tmp_path, row, template=template)
        assert "Be merry. Be brief." in tokenizer.decode(encoded.rows[0].tokens)
    # Never arguments of the renderer, nor what the template does not read.
    for name, message in (
        ("tools", r"row 1: .*has 'tools', an argument.*, and give tools in a column"),
        *((x, f"has '{x}', an argument") for x in ("return_tensors", "padding", "messages")),
        *((x, f"has '{x}', an argument") for x in ("add_generation_prompt", "tokenize")),
        ("moods", r"row 1: .*does not read 'moods' of chat_template_kwargs.*mood"),
    ):
        row = {"messages": SHORT, "chat_template_kwargs": {"mood": [], name: True}}
        with pytest.raises(ConfigError, match=message):
            rows_of(tmp_path, row, template=mood)


ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
ENDLESS += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
LATE = CHATML.replace("assistant\n' -}}{%- endif", "assistant\n<think>' -}}{%- endif")


@pytest.mark.parametrize(
    ("template", "warned"),
    [
        (CHATML, ""),
        (ENDLESS, "ends with no token of its own"),
        (LATE, "marked behind other tokens"),
    ],
)
def test_warnings_of_a_template_are_given_once(template, warned, tmp_path, caplog):
    encoding._warn.cache_clear()
    rows_of(tmp_path, *messages(SHORT, LONG), template=template)
    assert caplog.text.count("chat template") == bool(warned) and warned in caplog.text


def test_a_question_is_all_that_was_said_before_its_answer(tmp_path):
    other = [turn("user", "What is 2 + 5?"), turn("assistant", "It is 7."), *LONG[2:]]
    write(tmp_path / "test.jsonl", *messages(LONG, other), {"messages": LONG})
    first, second, third = map(question, load("rows", "test", tmp_path))
    assert first == third != second and "it is 4" in first
    # Every answer of a conversation is trained; a system turn does not make another question.
    seen = questions(load("rows", "test", tmp_path))
    write(tmp_path / "test.jsonl", *messages(LONG[:2], [turn("system", "Be brief."), *LONG[:2]]))
    assert contaminated(load("rows", "test", tmp_path), seen) == [True, True]
    write(tmp_path / "test.jsonl", {"text": "Once."}, {"text": "Twice."})
    assert [*map(question, load("rows", "test", tmp_path))] == ["once", "twice"]


# --- what does not fit ----------------------------------------------------------------------------


def test_a_long_conversation_is_cut_behind_an_answer(tmp_path, caplog):
    tokenizer, whole = rows_of(tmp_path, *messages(LONG, SHORT))

    def cut_to(length, *rows):
        data = DataConfig(bucket_lengths=(length,))
        return rows_of(tmp_path, *messages(*rows), data=data)[1]

    cut = cut_to(max(len(row.tokens) for row in whole.rows) - 1, LONG, SHORT)
    assert (cut.truncated, cut.dropped, len(cut)) == (1, 0, 2)
    assert "cut 1 of 2 documents or conversations" in caplog.text
    shortened = cut.rows[0]
    assert tokenizer.decode(shortened.tokens).endswith("assistant\nIt is 4.<eos>\n")
    assert trained(tokenizer, shortened) == ["It is 4.<eos>\n"]
    assert len(shortened.segments) == len(shortened.tokens)
    exact = cut_to(len(shortened.tokens), LONG)  # to the token
    assert exact.rows[0].tokens.tolist() == shortened.tokens.tolist()
    # The first answer must fit.
    dropped = cut_to(80, [turn("user", "x" * 100), *LONG[1:]], SHORT)
    assert (dropped.truncated, dropped.dropped, len(dropped)) == (0, 1, 1)


# --- what is refused ------------------------------------------------------------------------------


ADD = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
TOLD = [turn("system", "Hello"), *SHORT]  # in words of the user's
NEEDS_SYSTEM = "{{ 1 // 0 if messages[0].role != 'system' }}" + unmarked(CHATML)
CALL, SEE = [SHORT[0], ADD, turn("tool", "4"), SHORT[1]], turn("assistant", "see <eos> here")
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}" + THINKING.split("-%}", 1)[1]


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (GEMMA, WITH_SYSTEM, r"row 1: .*System role not supported.*at the start of the first"),
        (GEMMA, [SHORT[0], *SHORT], r"refuses turns of user, user, assistant: .*must alternate"),
        (DROPS_SYSTEM, WITH_SYSTEM, r"leaves out or changes turn 1 \(system\): 'Be short.'"),
        (DROPS_SYSTEM, TOLD, r"leaves out or changes turn 1 \(system\): 'Hello'"),
        (NEEDS_SYSTEM, SHORT, r"row 1: .*refuses turns of user, assistant: ZeroDivision"),
        *(
            (CHATML, [SHORT[0], SHORT[1] | {name: "x"}], f"leaves out '{name}' of turn 2")
            for name in ("reasoning_content", "thinking", "function_call", "tool_call")
        ),
        (unmarked(CHATML), SHORT[1:], r"begins with a turn of the assistant"),
        (CHANNELS, LONG, r"the end of turn 2 cannot be found"),
        (THINKING, [SHORT[0], SEE, *LONG[2:]], r"the end of turn 2 cannot be found"),
        (LLAMA, CALL, r"leaves out the tool calls of turn 2"),
        (None, SHORT, r"needs a tokenizer with a chat template"),
    ],
)
def test_what_a_template_cannot_write(template, turns, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        rows_of(tmp_path, *messages(turns), template=template)
    data = DataConfig(bucket_lengths=(1024,), prompt_style="alpaca")
    with pytest.raises(ConfigError, match=r"data.prompt_style='alpaca' must be 'chat'"):
        rows_of(tmp_path, *messages(turns), template=template, data=data)


def test_an_answer_that_merges_with_the_template():
    """As a token of two line breaks would: the model would never see what it is trained on."""

    tokenizer = byte_tokenizer(chat_template=unmarked(CHATML), pair="\u010a\u010a")
    (example,) = _examples([[turn("user", "Hi"), turn("assistant", "\nHo")]])
    with pytest.raises(ConfigError, match=r"before turn 2 .* writes other.*Strip white space"):
        encode_examples([example], tokenizer, ROOM)
    [(_, mask)] = encode_examples(_examples([SHORT]), tokenizer, ROOM)
    assert mask.any()


def _examples(conversations):
    return [Example("", "", turns=tuple(turns)) for turns in conversations]
