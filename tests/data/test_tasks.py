"""Tasks: rows to examples, splits, parsing and scoring."""

import itertools
import json

import pytest
from support.tasks import prompts_of, write_questions

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.splits import normalise
from zflora_jax.data.tasks import (
    GROUPS,
    HOLD_OUT,
    SPLITS,
    TASKS,
    Example,
    get_task,
    load_examples,
    numbers,
)

# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("5-3 = 2, 1,234.5 and -7", ["5", "3", "2", "1234.5", "-7"]),
        ("$.50, 10% of 1,000,000; 3,4", [".50", "10", "1000000", "3", "4"]),
        ("solution1, v2, 4th", ["4"]),
        ("", []),
    ],
)
def test_numbers(text, found):
    assert numbers(text) == found


@pytest.mark.parametrize(
    ("completion", "parsed"),
    [
        ("2 + 2 = 4. The answer is 4.", "4"),
        ("The answer is $1,250.50 in 3 days.", "1250.50"),
        ("The answer is 49 - 34 = 15 customers.", "15"),
        ("The answer is 3. No: the answer is -7.\nAsk 9 more.", "-7"),
        ("THE ANSWER IS: **12**", "12"),
        ("The answer is\n5", "5"),
        ("First 3, then 8 apples.", "8"),
        ("The answer is unknown, as 3 is 4.\n6", "3"),
        ("no idea", ""),
    ],
)
def test_parse_number(completion, parsed):
    assert TASKS["gsm8k"].parse(completion) == TASKS["arithmetic"].parse(completion) == parsed


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("4", "4.0", True),
        ("4.0009", "4", True),
        ("4.0011", "4", False),
        ("1012", "1,012", True),
        ("-4", "4", False),
        ("", "4", False),
        ("x", "4", False),
    ],
)
def test_score_number(prediction, answer, right):
    assert TASKS["gsm8k"].score(prediction, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("the correct answer is solution1", "solution1", True),
        ("the correct answer is solution2", "solution1", False),
        ("solution1", "solution1", True),
        ("The correct answer is True.", "true", True),
        ("The answer is untrue", "true", False),
        ("So the answer is (B).", "B", True),
        ("Because the answer is (D).", "B", False),
        ("so 16 - 12 = 4 kids. The answer is 16 - 12 = 4 kids.", "4.0", True),
        ("it makes 4", "4.0", True),
        ("The answer is New York, I think", "new york", True),
        ("", "true", False),
        ("", "4", False),
    ],
)
def test_json_answers_are_numbers_or_words(completion, answer, right):
    task = TASKS["rows"]
    assert task.score(task.parse(completion), answer) is right


# --- examples and splits --------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_arithmetic_targets_score_as_right_and_wrong_answers_do_not(split):
    task, examples = TASKS["arithmetic"], load_examples("arithmetic", split, DataConfig())
    assert len(examples) == (4000 if split == "train" else 400)
    for example in examples[:100]:
        assert task.score(task.parse(example.target), example.answer)
        assert not task.score(
            task.parse(example.target.replace(f"is {example.answer}.", "is 9999.")), example.answer
        )


def test_arithmetic_data_can_be_kept_elsewhere(tmp_path):
    assert (
        len(load_examples("arithmetic", "test", DataConfig(data_dir=str(tmp_path / "kept")))) == 400
    )
    assert (tmp_path / "kept" / "arithmetic").is_dir()


def test_examples_are_a_sequence(tmp_path):
    write_questions(tmp_path / "test.json", ["a", "b", "c"], input="more")
    examples = load_examples("rows", "test", DataConfig(data_dir=str(tmp_path)))
    assert examples[0] == Example("a", "A: The answer is 0.", "0", "more", form="instruction")
    assert [e.prompt for e in examples] == ["a", "b", "c"]
    assert [e.prompt for e in examples[1:]] == ["b", "c"] and examples[-1].prompt == "c"
    with pytest.raises(IndexError):
        examples[3]


def test_gsm8k_rows(tmp_path):
    (tmp_path / "test.jsonl").write_text(
        json.dumps({"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"})
    )
    (example,) = load_examples("gsm8k", "test", DataConfig(data_dir=str(tmp_path)))
    assert example == Example("q", "1+1=2\nThe answer is 2.", "2")


def test_missing_splits_are_held_out_of_train(tmp_path):
    questions = [f"q{i}" for i in range(100)]
    write_questions(tmp_path / "train.jsonl", questions)
    parts = {split: prompts_of(split, tmp_path) for split in SPLITS}
    assert {split: len(rows) for split, rows in parts.items()} == {
        "train": 80,
        "validation": 10,
        "test": 10,
    }
    assert sorted(itertools.chain(*parts.values())) == sorted(questions)
    # Not a matter of the run's seed.
    assert parts == {split: prompts_of(split, tmp_path, seed=5) for split in SPLITS}
    # A file alone is a train file.
    assert parts == {split: prompts_of(split, tmp_path / "train.jsonl") for split in SPLITS}

    write_questions(tmp_path / "test.json", ["t0", "t1"])
    assert prompts_of("test", tmp_path) == ["t0", "t1"]
    # A test file appearing does not move the validation rows.
    assert prompts_of("validation", tmp_path) == parts["validation"]
    assert sorted(prompts_of("train", tmp_path)) == sorted(parts["train"] + parts["test"])
    write_questions(tmp_path / "validation.json", ["v0"])
    assert prompts_of("validation", tmp_path) == ["v0"]
    assert sorted(prompts_of("train", tmp_path)) == sorted(questions)


def test_what_is_held_out_has_no_twin_in_train(tmp_path):
    """Questions that differ in case and marks alone hash apart; the one held out is then
    left out.
    """
    rows = [
        {
            "instruction": f"How many is {i % 200}{'?' * (i // 200)}",
            "input": "",
            "output": str(i),
            "answer": str(i),
        }
        for i in range(300)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data = DataConfig(task="rows", data_dir=str(tmp_path))
    train, *held = (load_examples("rows", split, data) for split in SPLITS)
    plain = {normalise(train[i].prompt) for i in range(len(train))}
    for part in held:
        assert len(part) < 30 and not plain & {normalise(part[i].prompt) for i in range(len(part))}
    assert sum(map(len, held)) > 0


def test_a_hold_out_has_a_bound_and_keeps_equal_questions_together(tmp_path):
    write_questions(tmp_path / "train.json", [f"q{i // 3}" for i in range(3 * 1000)])
    parts = {split: prompts_of(split, tmp_path) for split in SPLITS}
    assert (
        HOLD_OUT <= len(parts["validation"]) < HOLD_OUT + 3
        and HOLD_OUT <= len(parts["test"]) < HOLD_OUT + 3
    )
    assert sum(map(len, parts.values())) == 3000
    assert not set(parts["train"]) & set(parts["validation"]) and not set(parts["train"]) & set(
        parts["test"]
    )
    assert not set(parts["validation"]) & set(parts["test"])


def test_train_limit_takes_a_nested_sample_of_train_alone(tmp_path):
    write_questions(tmp_path / "train.json", [f"q{i}" for i in range(100)])
    few, more = (
        prompts_of("train", tmp_path, train_limit=5),
        prompts_of("train", tmp_path, train_limit=20),
    )
    assert more[:5] == few and len(more) == 20
    assert len(prompts_of("test", tmp_path, train_limit=5)) == 10
    assert len(prompts_of("train", tmp_path, train_limit=10**6)) == 80


# --- options --------------------------------------------------------------------------------------


def choice(
    directory,
    answer="answer2",
    output="the correct answer is answer2",
    allowed="answer1/answer2/answer3",
):
    (directory / "ARC-Easy").mkdir(exist_ok=True)
    rows = [
        {"instruction": f"Which?\n\nAnswer format: {a}", "input": "", "output": o, "answer": w}
        for a, o, w in [("a/b", "a", "a"), (allowed, output, answer)]
    ]
    (directory / "ARC-Easy" / "test.json").write_text(json.dumps(rows))
    return load_examples("arc_easy", "test", DataConfig(data_dir=str(directory)))


def test_options_have_the_form_of_the_target(tmp_path):
    assert choice(tmp_path)[1].options == tuple(
        f"the correct answer is answer{i}" for i in (1, 2, 3)
    )
    bare = choice(tmp_path, output="answer2.", allowed="answer1/answer2")[1]
    assert bare.options == ("answer1.", "answer2.") and bare.target in bare.options


def test_an_answer_that_is_no_option_is_an_error_with_its_row(tmp_path):
    examples = choice(tmp_path, answer="answer4")
    assert examples[0].options == ("a", "b")
    with pytest.raises(
        ConfigError,
        match=(
            r"'arc_easy': \S+test.json, row 2: the answer is 'answer4'.*not one of .*answer1,"
            r" answer2, answer3"
        ),
    ):
        examples[1]
    with pytest.raises(
        ConfigError, match=r"row 2: the output 'two' does not state the answer 'answer2'"
    ):
        choice(tmp_path, output="two")[-1]


def test_rows_without_an_answer_are_for_tasks_that_need_none(tmp_path):
    row = {"instruction": "Which?\n\nAnswer format: yes/no", "output": "yes"}
    (tmp_path / "train.json").write_text(json.dumps([row] * 9))
    data = DataConfig(data_dir=str(tmp_path))
    own = load_examples("rows", "train", data)[0]
    assert (own.target, own.answer, own.options) == ("yes", "", ())
    with pytest.raises(
        ConfigError, match=r"row \d: the answer is empty, and 'gsm8k' is scored by it.*task 'rows'"
    ):
        load_examples("gsm8k", "train", data)[0]


# --- the registry ---------------------------------------------------------------------------------


def test_the_papers_18_tasks():
    assert {name: len(tasks) for name, tasks in GROUPS.items()} == {
        "commonsense": 8,
        "math": 6,
        "summary": 4,
    }
    for group, names in GROUPS.items():
        assert all(get_task(name).group == group for name in names)
    assert "mawps" not in GROUPS["math"] and TASKS["mawps"].group == "math"
    assert {task.group for task in TASKS.values()} == {*GROUPS, "other"}
    assert all(name == task.name for name, task in TASKS.items())
