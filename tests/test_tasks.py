"""Tasks: rows to examples, splits, parsing and scoring."""

import itertools
import json
import os
from pathlib import Path

import pytest

from zflora_jax.config import DataConfig
from zflora_jax.data.tasks import HOLD_OUT, SPLITS, TASKS, Example, load_examples, numbers
from zflora_jax.fields import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path_factory.getbasetemp() / "tfds"))  # shared by the module's tests


def write(path, questions, **fields):
    rows = [{"instruction": q, "input": "", "output": f"A: The answer is {i}.", "answer": str(i)} | fields for i, q in enumerate(questions)]
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))


def prompts_of(split, directory, task="json", **fields):
    return [example.prompt for example in load_examples(task, split, DataConfig(data_dir=str(directory), **fields))]


# --- answers ------------------------------------------------------------------------------------------------------


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
    task = TASKS["json"]
    assert task.score(task.parse(completion), answer) is right


# --- examples and splits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_arithmetic_targets_score_as_right_and_wrong_answers_do_not(split):
    task, examples = TASKS["arithmetic"], load_examples("arithmetic", split, DataConfig())
    assert len(examples) == (4000 if split == "train" else 400)
    for example in examples[:100]:
        assert task.score(task.parse(example.target), example.answer)
        assert not task.score(task.parse(example.target.replace(f"is {example.answer}.", "is 9999.")), example.answer)


def test_arithmetic_data_can_be_kept_elsewhere(tmp_path):
    assert len(load_examples("arithmetic", "test", DataConfig(data_dir=str(tmp_path / "kept")))) == 400
    assert (tmp_path / "kept" / "arithmetic").is_dir()


def test_examples_are_a_sequence(tmp_path):
    write(tmp_path / "test.json", ["a", "b", "c"], input="more")
    examples = load_examples("json", "test", DataConfig(data_dir=str(tmp_path)))
    assert examples[0] == Example("a", "The answer is 0.", "0", "more")
    assert [e.prompt for e in examples] == ["a", "b", "c"]
    assert [e.prompt for e in examples[1:]] == ["b", "c"] and examples[-1].prompt == "c"
    with pytest.raises(IndexError):
        examples[3]


def test_gsm8k_rows(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "q", "answer": "1+1=<<1+1=2>>2\n#### 2"}))
    (example,) = load_examples("gsm8k", "test", DataConfig(data_dir=str(tmp_path)))
    assert example == Example("q", "1+1=2\nThe answer is 2.", "2")


def test_missing_splits_are_held_out_of_train(tmp_path):
    questions = [f"q{i}" for i in range(100)]
    write(tmp_path / "train.jsonl", questions)
    parts = {split: prompts_of(split, tmp_path) for split in SPLITS}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 80, "validation": 10, "test": 10}
    assert sorted(itertools.chain(*parts.values())) == sorted(questions)
    assert parts == {split: prompts_of(split, tmp_path, seed=5) for split in SPLITS}  # not a matter of the run's seed
    assert parts == {split: prompts_of(split, tmp_path / "train.jsonl") for split in SPLITS}  # a file alone is a train file

    write(tmp_path / "test.json", ["t0", "t1"])
    assert prompts_of("test", tmp_path) == ["t0", "t1"]
    assert prompts_of("validation", tmp_path) == parts["validation"]  # a test file appearing does not move the validation rows
    assert sorted(prompts_of("train", tmp_path)) == sorted(parts["train"] + parts["test"])
    write(tmp_path / "validation.json", ["v0"])
    assert prompts_of("validation", tmp_path) == ["v0"]
    assert sorted(prompts_of("train", tmp_path)) == sorted(questions)


def test_a_hold_out_has_a_bound_and_keeps_equal_questions_together(tmp_path):
    write(tmp_path / "train.json", [f"q{i // 3}" for i in range(3 * 1000)])
    parts = {split: prompts_of(split, tmp_path) for split in SPLITS}
    assert HOLD_OUT <= len(parts["validation"]) < HOLD_OUT + 3 and HOLD_OUT <= len(parts["test"]) < HOLD_OUT + 3
    assert sum(map(len, parts.values())) == 3000
    assert not set(parts["train"]) & set(parts["validation"]) and not set(parts["train"]) & set(parts["test"])
    assert not set(parts["validation"]) & set(parts["test"])


def test_train_limit_takes_a_nested_sample_of_train_alone(tmp_path):
    write(tmp_path / "train.json", [f"q{i}" for i in range(100)])
    few, more = prompts_of("train", tmp_path, train_limit=5), prompts_of("train", tmp_path, train_limit=20)
    assert more[:5] == few and len(more) == 20
    assert len(prompts_of("test", tmp_path, train_limit=5)) == 10
    assert len(prompts_of("train", tmp_path, train_limit=10**6)) == 80


# --- wrong settings -----------------------------------------------------------------------------------------------


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"unknown task 'gsm8': did you mean 'gsm8k'\? Allowed: arithmetic, gsm8k, json"):
        load_examples("gsm8", "train", DataConfig())
    with pytest.raises(ConfigError, match=r"unknown split 'tests': did you mean 'test'"):
        load_examples("arithmetic", "tests", DataConfig())


def test_missing_files(tmp_path):
    def fails(message, split="train", directory=tmp_path):
        with pytest.raises(ConfigError, match=message):
            load_examples("gsm8k", split, DataConfig(data_dir=directory and str(directory)))

    fails(r"'gsm8k' reads files, but data.data_dir is not set. Set data.data_dir to", directory=None)
    fails(r"nowhere' does not exist", directory=tmp_path / "nowhere")
    fails(r"no train, validation or test file in")
    write(tmp_path / "test.json", ["a"])
    fails(r"no train file in .*found test.json.*validation.json\(l\)", split="validation")
    fails(r"no train file in .*found test.json")
    write(tmp_path / "train.json", ["a", "b"])
    fails(r"train.json has 2 rows, too few to hold out a validation split", split="validation")
    assert len(prompts_of("train", tmp_path)) == 2
    write(tmp_path / "train.jsonl", ["a", "b"])
    fails(r"both train.json and train.jsonl")


def test_a_malformed_row_is_named_through_the_task(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n')
    with pytest.raises(ConfigError, match=r"test.jsonl, row 2: no field 'answer'"):
        load_examples("gsm8k", "test", DataConfig(data_dir=str(tmp_path)))
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"test.jsonl: no rows"):
        load_examples("gsm8k", "test", DataConfig(data_dir=str(tmp_path)))


# --- real files ---------------------------------------------------------------------------------------------------


def real(relative):
    path = Path(os.environ.get("ZFLORA_DATA") or Path(__file__).parents[2] / "shared" / "data") / relative
    if not path.exists():
        pytest.skip(f"{path} is not there; set ZFLORA_DATA to the folder of the real data")
    return path


def test_real_gsm8k():
    directory, task = real("gsm8k"), TASKS["gsm8k"]
    sizes = {}
    questions = {}
    for split in SPLITS:
        examples = load_examples("gsm8k", split, DataConfig(data_dir=str(directory)))
        sizes[split], questions[split] = len(examples), {e.prompt for e in examples}
        for example in examples[:: 1 if split != "train" else 20]:
            assert "<<" not in example.target and "####" not in example.target
            assert task.score(task.parse(example.target), example.answer), example
    assert sizes == {"train": 7273, "validation": 200, "test": 1319}
    assert not questions["train"] & questions["validation"]


def test_real_llm_adapters():
    data = DataConfig(data_dir=str(real("llm_adapters/ft-training_set/math_data.json")))
    sizes = {split: len(load_examples("json", split, data)) for split in SPLITS}
    assert sum(sizes.values()) == 3260 and sizes["validation"] >= 200 and sizes["test"] >= 200
    assert not any(e.target.startswith(("\n", "A:")) for e in load_examples("json", "validation", data))


@pytest.mark.parametrize("name", ["boolq", "ARC-Easy", "mawps"])
def test_real_llm_adapters_tests(name):
    task, examples = TASKS["json"], load_examples("json", "test", DataConfig(data_dir=str(real(f"llm_adapters/dataset/{name}"))))
    assert all(task.score(task.parse(example.target), example.answer) for example in examples[:200])
