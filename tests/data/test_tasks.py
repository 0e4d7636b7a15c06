"""Tasks: where their files are looked for, splits, and rows to examples."""

import itertools
import json

import pytest
from support.tasks import load, prompts_of, write_questions

from zflora_jax import ConfigError, DataConfig
from zflora_jax.data.tasks import HOLD_OUT, SPLITS, load_examples

# --- files ----------------------------------------------------------------------------------------


def test_the_first_folder_that_has_files_is_read(tmp_path):
    root = tmp_path / "gsm8k"
    for below in ("llm_adapters/gsm8k", "llm_adapters/dataset/gsm8k", "dataset/gsm8k", "gsm8k"):
        write_questions(root / below / "test.json", [below])
        assert prompts_of("test", root, "gsm8k") == [below]
    write_questions(root / "test.json", ["the folder itself"])
    assert prompts_of("test", root, "gsm8k") == ["gsm8k"]
    assert prompts_of("test", root) == ["the folder itself"]
    aqua = tmp_path / "aqua"  # in another case
    write_questions(aqua / "test.jsonl", ["q"], answer="B")
    assert prompts_of("test", aqua, "aqua") == ["q"]


ADDSUB = r"Tried: \S+/AddSub, \S+/dataset/AddSub, \S+/llm_adapters/dataset/AddSub, .*that holds"
ADDSUB += r" AddSub/.*AddSub/\{train.json\(l\), .*AGI-Edgerunners/LLM-Adapters"
NEEDS = r"no train file next to \S+test.json. The (\w+) split needs train.json\(l\)"


@pytest.mark.parametrize(
    ("asked", "file", "below", "message"),
    [
        ("rows test", "", None, r"data_dir=None is not set, and the task reads files. Set"),
        ("woz test", "", None, r"data_dir=None is not set, .* the folder that holds woz/"),
        ("rows train", "", "", r"Files may be .json, .jsonl, .csv, .parquet.*hub:OWNER"),
        ("gsm8k test", "", "nowhere", r"nowhere' does not exist"),
        ("rows test", "", "gs://b/rows", r"'gs://b/rows' is a URL, and rows .*gcsfuse"),
        ("gsm8k test", "", "", r"has no train, validation or test file.*grade-school-math"),
        ("addsub test", "test.json", "", ADDSUB),  # not in a folder of the task's
        ("addsub test", "test.json", "test.json", r"test.json' is a file. Set data.data_dir to"),
        ("dialogsum test", "", "", r"dialogsum/\{dialogsum.train.json\(l\), .*cylnlp/dialogsum"),
        ("woz test", "", "", r"woz_train_en.json\(l\).*nmrksic/neural-belief-tracker"),
        ("math_10k train", "", "", r"Tried: .*ft-training_set.*math_10k.json\(l\).*LLM-Adapters"),
        ("gsm8k validation", "gsm8k/test.json", "", NEEDS + r" or validation.json\(l\)"),
        ("piqa train", "piqa/test.json", "", NEEDS + " there. Or train on another task"),
        ("gsm8k validation", "gsm8k/train.json", "", r"train.json has 2 rows, too few different"),
        ("rows train", "train.jsonl", "", r"has train.json and train.jsonl for one split"),
        ("gsm8 train", "", "", r"unknown task 'gsm8': did you mean 'gsm8k'\? Allowed: addsub, "),
        ("rows tests", "", "", r"unknown split 'tests': did you mean 'test'"),
    ],
)
def test_missing_files(asked, file, below, message, tmp_path):
    for name in [file, "train.json"] if file == "train.jsonl" else [file] if file else []:
        write_questions(tmp_path / name, ["a", "b"])
    place = below if below is None or ":" in below else tmp_path / below
    with pytest.raises(ConfigError, match=message):
        load(*asked.split(), place)


# --- examples -------------------------------------------------------------------------------------


def choice(directory, answer="answer2", output="the correct answer is answer2", allowed=3):
    formats = ["a/b", "/".join(f"answer{i}" for i in range(1, allowed + 1))]
    rows = [
        {"instruction": f"Which?\n\nAnswer format: {a}", "input": "", "output": o, "answer": w}
        for a, o, w in zip(formats, ["a", output], ["a", answer], strict=True)
    ]
    (directory / "ARC-Easy").mkdir(exist_ok=True)
    (directory / "ARC-Easy" / "test.json").write_text(json.dumps(rows))
    return load_examples("arc_easy", "test", DataConfig(data_dir=str(directory)))


def test_options_have_the_form_of_the_target(tmp_path):
    examples = choice(tmp_path)
    assert examples[0].options == ("a", "b")
    assert examples[1].options == tuple(f"the correct answer is answer{i}" for i in (1, 2, 3))
    bare = choice(tmp_path, output="answer2.", allowed=2)[1]
    assert bare.options == ("answer1.", "answer2.") and bare.target in bare.options
    message = r"'arc_easy': \S+test.json, row 2: the answer is 'answer4'.*not one of .*answer1, an"
    with pytest.raises(ConfigError, match=message):
        choice(tmp_path, answer="answer4")[1]
    with pytest.raises(ConfigError, match=r"row 2: the output 'two' does not state the answer"):
        choice(tmp_path, output="two")[-1]


def test_rows_without_an_answer_are_for_tasks_that_need_none(tmp_path):
    row = {"instruction": "Which?\n\nAnswer format: yes/no", "output": "yes"}
    (tmp_path / "gsm8k").mkdir()
    for folder in (tmp_path, tmp_path / "gsm8k"):
        (folder / "train.json").write_text(json.dumps([row] * 9))
    own = load("rows", "train", tmp_path)[0]
    assert (own.target, own.answer, own.options) == ("yes", "", ())
    message = r"row \d: the answer is empty, and 'gsm8k' is scored by it.*task 'rows'"
    with pytest.raises(ConfigError, match=message):
        load("gsm8k", "train", tmp_path)


# --- splits ---------------------------------------------------------------------------------------


def test_missing_splits_are_held_out_of_train(tmp_path):
    questions = [f"q{i}" for i in range(100)]
    write_questions(tmp_path / "train.jsonl", questions)

    def parts(place=tmp_path, **fields):
        return {split: sorted(prompts_of(split, place, **fields)) for split in SPLITS}

    found = parts()
    assert [len(rows) for rows in found.values()] == [80, 10, 10]
    assert sorted(itertools.chain(*found.values())) == sorted(questions)
    # Not a matter of the run's seed; and a file alone is a train file.
    assert found == parts(seed=5) == parts(tmp_path / "train.jsonl")

    write_questions(tmp_path / "test.json", ["t0", "t1"])
    # A test file appearing does not move the validation rows.
    train = sorted(found["train"] + found["test"])
    assert parts() == {"train": train, "validation": found["validation"], "test": ["t0", "t1"]}
    write_questions(tmp_path / "validation.json", ["v0"])
    assert parts() == {"train": sorted(questions), "validation": ["v0"], "test": ["t0", "t1"]}


def test_a_hold_out_has_a_bound_and_no_twin_in_train(tmp_path):
    """Questions that differ in case and marks alone hash apart; that held out is then left out."""
    questions = [f"How many is {i % 200}{'?' * (i // 200)}" for i in range(300)]
    write_questions(tmp_path / "train.json", questions)
    train, *held = ({q.rstrip("?") for q in prompts_of(split, tmp_path)} for split in SPLITS)
    assert all(len(part) < 30 and not train & part for part in held) and any(held)
    write_questions(tmp_path / "train.json", [f"q{i // 3}" for i in range(3 * 1000)])
    train, *held = (prompts_of(split, tmp_path) for split in SPLITS)
    assert all(HOLD_OUT <= len(part) < HOLD_OUT + 3 for part in held)
    assert len(train) + sum(map(len, held)) == 3000
    assert not {*train} & {*held[0]} and not {*train} & {*held[1]} and not {*held[0]} & {*held[1]}


def test_train_limit_takes_a_nested_sample_of_train_alone(tmp_path):
    write_questions(tmp_path / "train.json", [f"q{i}" for i in range(100)])
    few, more, all_rows = (prompts_of("train", tmp_path, train_limit=n) for n in (5, 20, 10**6))
    assert more[:5] == few and (len(more), len(all_rows)) == (20, 80)
    assert len(prompts_of("test", tmp_path, train_limit=5)) == 10
