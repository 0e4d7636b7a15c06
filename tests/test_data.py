"""Builders, prompts and batches."""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from support.byte_tokenizer import BOS, EOS, PAD, byte_tokenizer

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data import prompts
from zflora_jax.data.builders import open_prepared
from zflora_jax.data.builders.arithmetic import TEMPLATES, Arithmetic, generate
from zflora_jax.data.builders.files import file_config
from zflora_jax.data.builders.formats import LocalJson, read_rows
from zflora_jax.data.pipeline import eval_batches, train_batches
from zflora_jax.data.tasks import Example
from zflora_jax.data.tokenization import (
    Encoded,
    TokenizedExample,
    encode_prompts,
    tokenize_examples,
)


@pytest.fixture(scope="module")
def generated():
    return generate()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def encoded_rows(count, pad_id=PAD):
    """Rows whose only token values are their own index, of lengths 2 to 6."""
    rows = tuple(
        TokenizedExample(
            np.full(2 + i % 5, i, np.int32), np.ones(2 + i % 5, bool), np.ones(2 + i % 5, np.int32)
        )
        for i in range(count)
    )
    return Encoded(rows, tuple(range(count)), 0, pad_id, parts=(count,))


def row_ids(batch):
    return batch["tokens"][:, 0].tolist()


def assert_same_batches(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"tokens", "loss_mask", "segments"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


# --- generated arithmetic -------------------------------------------------------------------------


def test_the_generated_rows_are_these(generated):
    digest = hashlib.sha256(json.dumps(generated).encode()).hexdigest()
    assert digest.startswith("24d46120650970c5"), (
        "The generated rows changed. If you meant it, raise Arithmetic.VERSION (prepared data is"
        " kept by version) and update this digest."
    )


def test_splits_are_disjoint_and_without_duplicates(generated):
    assert {split: len(rows) for split, rows in generated.items()} == {
        "train": 4000,
        "validation": 400,
        "test": 400,
    }
    questions = [row["question"] for rows in generated.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_every_split_holds_every_template_evenly(generated):
    assert len(TEMPLATES) >= 12
    assert len({t.question for t in TEMPLATES}) == len(TEMPLATES)
    for rows in generated.values():
        for i, row in enumerate(rows):
            form = re.escape(TEMPLATES[i % len(TEMPLATES)].question)
            assert re.fullmatch(re.sub(r"\\{\w+\\}", r"\\w+", form), row["question"]), row


def test_every_worked_answer_is_right(generated):
    """Every "a op b = c" of a rationale holds, uses numbers of the question or results before it,
    and the last result is the answer.
    """
    operations = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "/": lambda a, b: a / b,
    }
    seen = set()
    for row in itertools.chain(*generated.values()):
        known = [int(n) for n in re.findall(r"\d+", row["question"])]
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", row["rationale"])
        assert steps
        for a, op, b, c in steps:
            assert int(a) in known and int(b) in known, row
            assert operations[op](int(a), int(b)) == int(c) > 0, row
            known.append(int(c))
            seen.add(op)
        assert row["answer"] == steps[-1][3]
        assert row["rationale"].endswith(f"The answer is {row['answer']}.")
    assert seen == set("+-*/")


def test_generation_is_the_same_in_another_process(generated):
    code = (
        "import json; from zflora_jax.data.builders.arithmetic import generate;"
        " print(json.dumps(generate()))"
    )
    env = os.environ | {"PYTHONHASHSEED": "7"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=env,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    assert json.loads(out.stdout) == generated


def test_round_trip_through_array_record_without_tensorflow(generated, tmp_path):
    """In two processes at once: both prepare, both read all rows in order, neither imports
    tensorflow, stdout stays clean.
    """
    code = """
import sys
from zflora_jax.data.builders import open_prepared
from zflora_jax.data.builders.arithmetic import Arithmetic, generate
for split, rows in generate().items():
    source = open_prepared(Arithmetic, split, sys.argv[1])
    assert len(source) == len(rows)
    assert [{k: v.decode() for k, v in source[i].items()} for i in range(len(rows))] == rows
import grain
print("tensorflow" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    root = os.path.dirname(os.path.dirname(__file__))
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
        )
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == "False\n"
    # No half-written directory is left.
    assert [path.name for path in (tmp_path / "cache" / "arithmetic").iterdir()] == ["1.0.0"]


def test_a_preparation_that_lost_the_race_reads_what_the_winner_wrote(tmp_path):
    def make(**arguments):
        def lose_the_race():
            Arithmetic(**arguments).download_and_prepare()
            raise FileExistsError("Cannot rename")

        builder = Arithmetic(**arguments)
        if not builder.is_prepared():
            builder.download_and_prepare = lose_the_race
        return builder

    assert len(open_prepared(make, "test", tmp_path)) == 400


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot prepare.*file.*ZFLORA_CACHE"):
        open_prepared(Arithmetic, "test", tmp_path / "file")


# --- local JSON -----------------------------------------------------------------------------------

GSM8K = {
    "question": "How many?",
    "answer": "6*2=<<6*2=12>>12 and 1,000 more: 12+1,000=<<12+1000=1012>>1,012.\n#### 1,012",
}
ADAPTERS = {
    "instruction": "How\nmany?",
    "input": "",
    "output": "\nA: Two and two. The answer is 4. ",
    "answer": "4.0",
}


@pytest.mark.parametrize("as_list", [True, False], ids=["json", "jsonl"])
def test_both_field_sets_are_read(tmp_path, as_list):
    path = tmp_path / "rows"
    rows = [
        GSM8K,
        ADAPTERS,
        ADAPTERS | {"output": ""},
        ADAPTERS | {"input": "a\u2028b", "output": "Apples. A: no."},
    ]
    path.write_text(
        (
            json.dumps(rows, ensure_ascii=False)
            if as_list
            else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
        ),
        "utf-8",
    )
    got = read_rows(path)
    assert got[0] == {
        "instruction": "How many?",
        "input": "",
        "output": "6*2=12 and 1,000 more: 12+1,000=1,012.\nThe answer is 1012.",
        "answer": "1012",
    }
    assert got[1] == {
        "instruction": "How\nmany?",
        "input": "",
        "output": "Two and two. The answer is 4.",
        "answer": "4.0",
    }
    assert got[2]["output"] == "The answer is 4.0."
    assert (got[3]["input"], got[3]["output"]) == ("a\u2028b", "Apples. A: no.")
    source = open_prepared(
        lambda **kw: LocalJson(config=file_config(path), **kw), "rows", tmp_path / "cache"
    )
    assert [{k: v.decode() for k, v in source[i].items()} for i in range(4)] == got


def test_own_rows_need_no_answer_and_keep_their_output(tmp_path):
    """The format that docs/howto.md names. An "A:" is LLM-Adapters' marker only in its rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "Spell it", "output": " A: b\n\tc\n"}))
    row = {"instruction": "Spell it", "input": "", "output": "A: b\n\tc", "answer": ""}
    assert read_rows(path) == [row]


GOOD = json.dumps(ADAPTERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n\n{{broken", r"data, row 3: invalid JSON at column 2"),
        (f"{GOOD}\n[1]", r"data, row 2: expected an object, got list"),
        (f"[{GOOD},", r"data: invalid JSON at line 1"),
        (f"[{GOOD}, 3]", r"data, row 2: expected an object, got int"),
        (
            json.dumps([{"instruction": "x", "answer": "y"}]),
            r"row 1: no field 'output', the row has 'instruction', 'answer'",
        ),
        (
            json.dumps([ADAPTERS | {"answer": 4}]),
            r"row 1: field 'answer' must be a string, got int 4",
        ),
        (
            json.dumps([ADAPTERS | {"input": None}]),
            r"row 1: field 'input' must be a string, got NoneType",
        ),
        (
            json.dumps([ADAPTERS | {"instruction": " "}]),
            r"row 1: the instruction \(or question\) is empty",
        ),
        (
            json.dumps([ADAPTERS | {"output": " ", "answer": ""}]),
            r"row 1: 'output' is empty and there is no 'answer'",
        ),
        (
            json.dumps([{"instruction": "x", "output": " "}]),
            r"row 1: 'output' is empty and there is no 'answer'",
        ),
        (
            json.dumps([GSM8K, {"question": "x", "answer": "12"}]),
            r"row 2: field 'answer' must end with '#### N', got '12'",
        ),
        ("[]", r"data: no rows"),
        (" \n", r"data: no rows"),
        (b"\xff\xfe", r"data: not UTF-8 text"),
    ],
)
def test_malformed_files_are_refused_with_their_row(tmp_path, text, message):
    path = tmp_path / "data"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        open_prepared(
            lambda **kw: LocalJson(config=file_config(path), **kw), "rows", tmp_path / "cache"
        )


def test_prepared_rows_follow_the_content_of_the_file(tmp_path):
    def read(path):
        source = open_prepared(
            lambda **kw: LocalJson(config=file_config(path), **kw), "rows", tmp_path / "cache"
        )
        return source[0]["answer"], sorted(
            p.name for p in (tmp_path / "cache" / "local_json").iterdir()
        )

    path = tmp_path / "train.json"
    path.write_text(json.dumps([ADAPTERS]))
    before, one = read(path)
    path.write_text(json.dumps([ADAPTERS | {"answer": "5"}]))
    after, two = read(path)
    (tmp_path / "moved.json").write_text(json.dumps([ADAPTERS]))
    moved, still_two = read(tmp_path / "moved.json")
    assert (before, after, moved) == (b"4.0", b"5", b"4.0")
    assert (len(one), len(two), len(still_two)) == (1, 2, 2)


# --- prompts --------------------------------------------------------------------------------------


def test_alpaca_text_byte_for_byte():
    s = " " * 16
    plain = (
        "Below is an instruction that describes a task. Write a response that appropriately"
        f" completes the request.  \n\n{s}### Instruction:\n{s}Add\n1 and 2.\n{s}\n{s}###"
        f" Response:\n{s}"
    )
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further"
        f" context. Write a response that appropriately completes the request. \n\n{s}###"
        f" Instruction:\n{s}Add.\n{s}\n{s}### Input:\n{s}1 2\n{s}\n{s}### Response:\n{s}"
    )
    assert prompts.render(None, "alpaca", "Add\n1 and 2.") == plain
    assert prompts.render(None, "alpaca", "Add.", "1 2") == with_input
    # The evaluation scripts: one space less at the end of each header, and nothing on the lines
    # between.
    assert prompts.render(None, "alpaca-eval", "Add\n1 and 2.") == plain.replace(
        "request.  ", "request. "
    ).replace(f"\n{s}\n", "\n\n")
    assert prompts.render(None, "alpaca-eval", "Add.", "1 2") == with_input.replace(
        "request. ", "request."
    ).replace(f"\n{s}\n", "\n\n")


def test_chat_uses_the_tokenizers_template(tokenizer):
    assert prompts.render(tokenizer, "chat", "Hi") == "[user]Hi<eos>\n[assistant]"
    assert prompts.render(tokenizer, "chat", "Hi", "there") == "[user]Hi\n\nthere<eos>\n[assistant]"


def test_wrong_styles_are_refused():
    with pytest.raises(ConfigError, match=r"chat template.*alpaca"):
        prompts.render(byte_tokenizer(chat_template=None), "chat", "Hi")
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        prompts.render(None, "alpacas", "Hi")


def test_the_end_token_is_the_one_the_template_puts_after_an_answer():
    template = (
        "{% for m in messages %}<bos>{{ m['role'] + '\n' + m['content'] + ' <pad>\n' }}{% endfor %}"
    )
    # Here <pad> plays <|eot_id|>.
    assert prompts.end_token(byte_tokenizer(chat_template=template), "chat") == PAD
    assert prompts.end_token(byte_tokenizer(chat_template=template), "alpaca") == EOS
    assert (
        prompts.end_token(
            byte_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"),
            "chat",
        )
        == EOS
    )
    without_eos = byte_tokenizer(chat_template=None)
    without_eos.eos_token = None
    with pytest.raises(ConfigError, match="no EOS"):
        prompts.end_token(without_eos, "alpaca")


@pytest.mark.parametrize("style", ["chat", "alpaca", "alpaca-eval"])
def test_the_loss_mask_covers_the_target_and_its_end_and_nothing_else(tokenizer, style):
    examples = [Example("2 and 3?", "2 + 3 = 5.", "5"), Example("é?", "日本", "1", input="x")]
    encoded = tokenize_examples(
        examples, tokenizer, DataConfig(prompt_style=style, bucket_lengths=(512,))
    )
    on_prompt = tokenize_examples(
        examples,
        tokenizer,
        DataConfig(prompt_style=style, bucket_lengths=(512,), train_on_prompt=True),
    )
    generation = encode_prompts(examples, tokenizer, style)
    for example, (tokens, mask, _), (_, full_mask, _), prompt in zip(
        examples, encoded.rows, on_prompt.rows, generation, strict=True
    ):
        assert tokens.dtype == np.int32 and mask.dtype == np.bool_
        # Training conditions on exactly the tokens that generation starts from.
        assert tokens[~mask].tolist() == prompt
        assert tokens[mask].tolist() == [*example.target.encode(), EOS]
        assert np.diff(mask.astype(int)).tolist().count(1) == 1 and mask[-1]
        assert full_mask.all()


@pytest.mark.parametrize("writes_bos", [True, False])
def test_exactly_one_bos_if_the_tokenizer_adds_one(writes_bos):
    template = (
        "<bos>" if writes_bos else ""
    ) + "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    example = [Example("q", "t", "1")]
    for style in ("chat", "alpaca"):
        tokens, mask, _ = tokenize_examples(
            example,
            byte_tokenizer(add_bos=True, chat_template=template),
            DataConfig(prompt_style=style),
        ).rows[0]
        assert tokens.tolist().count(BOS) == 1 and tokens[0] == BOS and not mask[0]
    tokens, *_ = tokenize_examples(
        example, byte_tokenizer(chat_template=template), DataConfig(prompt_style="alpaca")
    ).rows[0]
    assert BOS not in tokens


# --- tokenising and batching ----------------------------------------------------------------------


def test_long_rows_are_dropped_counted_and_reported(tokenizer, caplog):
    examples = [Example("q", "t" * n, "1") for n in (1, 200, 2, 300)]
    encoded = tokenize_examples(examples, tokenizer, DataConfig(bucket_lengths=(64, 128)))
    assert (len(encoded), encoded.kept, encoded.dropped, encoded.pad_id) == (2, (0, 2), 2, PAD)
    assert "dropped 2 of 4 examples longer than 128 tokens" in caplog.text
    with pytest.raises(
        ConfigError,
        match=(
            r"all 2 examples are longer.*data.bucket_lengths=\[8\].*data.bucket_lengths=\[8, 64\]"
        ),
    ):
        tokenize_examples(examples[::2], tokenizer, DataConfig(bucket_lengths=(8,)))


def test_a_row_of_exactly_the_longest_length_stays(tokenizer):
    whole = len(tokenize_examples([Example("q", "t", "1")], tokenizer, DataConfig()).rows[0][0])
    encoded = tokenize_examples(
        [Example("q", "t", "1")], tokenizer, DataConfig(bucket_lengths=(whole,))
    )
    assert next(train_batches(encoded, DataConfig(bucket_lengths=(whole,), batch_size=1)))[
        "segments"
    ].all()


def test_empty_datasets_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="dataset is empty"):
        tokenize_examples([], tokenizer, DataConfig())
    for batches in (lambda e: train_batches(e, DataConfig()), lambda e: eval_batches(e, 4, (8,))):
        with pytest.raises(ConfigError, match="dataset is empty"):
            batches(encoded_rows(0))


@pytest.mark.parametrize("start", [1, 3, 20])
def test_resuming_at_a_step_goes_on_as_if_uninterrupted(start):
    data, encoded = DataConfig(batch_size=4, bucket_lengths=(4, 6), seed=3), encoded_rows(10)
    whole = list(itertools.islice(train_batches(encoded, data), start + 8))
    resumed = list(itertools.islice(train_batches(encoded, data, start_step=start), 8))
    assert_same_batches(whole[start:], resumed)


def test_resuming_late_costs_nothing():
    data, encoded = DataConfig(batch_size=8, bucket_lengths=(8,)), encoded_rows(1000)
    assert next(train_batches(encoded, data, start_step=10**9))["tokens"].shape == (8, 8)


def test_every_epoch_is_another_permutation_of_all_rows():
    data, encoded = DataConfig(batch_size=4, bucket_lengths=(8,)), encoded_rows(10)
    order = [
        i for batch in itertools.islice(train_batches(encoded, data), 10) for i in row_ids(batch)
    ]
    epochs = [order[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed():
    orders = [
        [
            i
            for batch in itertools.islice(
                train_batches(
                    encoded_rows(50), DataConfig(batch_size=5, bucket_lengths=(8,), seed=seed)
                ),
                20,
            )
            for i in row_ids(batch)
        ]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][50:] != orders[2][:50]  # a seed's second epoch is not the next seed's first
    with pytest.raises(ConfigError, match=r"data\.seed=-1"):
        train_batches(encoded_rows(2), DataConfig(seed=-1))


def test_a_dataset_smaller_than_a_batch_repeats():
    batch = next(train_batches(encoded_rows(3), DataConfig(batch_size=8, bucket_lengths=(8,))))
    assert np.bincount(row_ids(batch)).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_batches_are_padded_right_to_the_smallest_length_that_fits():
    encoded = encoded_rows(5)  # lengths 2, 3, 4, 5, 6
    shapes = [batch["tokens"].shape for batch in eval_batches(encoded, 1, (3, 5, 8))]
    assert shapes == [(1, 3), (1, 3), (1, 5), (1, 5), (1, 8)]
    (batch,) = eval_batches(encoded, 5, (3, 5, 8))
    assert (
        batch["tokens"].dtype == batch["segments"].dtype == np.int32
        and batch["loss_mask"].dtype == np.bool_
    )
    assert batch["segments"].sum(1).tolist() == [2, 3, 4, 5, 6]
    for i in range(5):
        assert batch["tokens"][i].tolist() == [i] * (2 + i) + [PAD] * (6 - i)
    assert not batch["loss_mask"][batch["segments"] == 0].any()
    with pytest.raises(ConfigError, match="6 tokens"):
        list(eval_batches(encoded, 5, (3, 5)))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_evaluation_counts_every_row_once_whatever_the_batch_size(batch_size):
    batches = list(eval_batches(encoded_rows(7), batch_size, (8,)))
    assert all(batch["tokens"].shape == (batch_size, 8) for batch in batches)
    counted = [
        i
        for batch in batches
        for i, counts in zip(row_ids(batch), batch["loss_mask"].any(1), strict=True)
        if counts
    ]
    assert counted == list(range(7))
    # Also the filling rows have something to attend to.
    assert all(batch["segments"].any(1).all() for batch in batches)
