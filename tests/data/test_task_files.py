"""Where a task's files are looked for; what is said of wrong settings, folders and rows."""

import json

import pytest
from support.tasks import prompts_of, write_questions

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.tasks import (
    SPLITS,
    load_examples,
)


def test_unknown_names():
    with pytest.raises(
        ConfigError,
        match=r"unknown task 'gsm8': did you mean 'gsm8k'\? Allowed: addsub, aqua, .*, xsum",
    ):
        load_examples("gsm8", "train", DataConfig())
    with pytest.raises(ConfigError, match=r"unknown split 'tests': did you mean 'test'"):
        load_examples("arithmetic", "tests", DataConfig())


def fails(message, task, directory, split="test"):
    with pytest.raises(ConfigError, match=message):
        load_examples(task, split, DataConfig(data_dir=directory and str(directory)))


def test_missing_files(tmp_path):
    fails(r"'rows' reads files, but data.data_dir is not set. Set data.data_dir to", "rows", None)
    fails(r"nowhere' does not exist", "gsm8k", tmp_path / "nowhere")
    fails(r"no train, validation or test file in .*grade-school-math", "gsm8k", tmp_path)
    write_questions(tmp_path / "test.json", ["a"])
    fails(
        r"no train file beside .*test.json. The validation split needs train.json\(l\) or"
        r" validation.json\(l\)",
        "gsm8k",
        tmp_path,
        "validation",
    )
    fails(
        r"no train file beside .*test.json. The train split needs train.json\(l\) there",
        "gsm8k",
        tmp_path,
        "train",
    )
    write_questions(tmp_path / "train.json", ["a", "b"])
    fails(
        r"train.json has 2 rows, too few different ones to hold out validation",
        "gsm8k",
        tmp_path,
        "validation",
    )
    assert len(prompts_of("train", tmp_path)) == 2
    write_questions(tmp_path / "train.jsonl", ["a", "b"])
    fails(r"both train.json and train.jsonl", "gsm8k", tmp_path, "train")


def test_a_missing_folder_is_answered_with_what_was_tried_and_where_the_files_are(tmp_path):
    fails(
        r"no train, validation or test file in .*Tried: \S+/AddSub, \S+/dataset/AddSub,"
        r" \S+/llm_adapters/dataset/AddSub.*--data-dir\) the folder "
        r"that holds AddSub/.*AddSub/test.json\(l\).*AGI-Edgerunners/LLM-Adapters",
        "addsub",
        tmp_path,
    )
    fails(
        r"Tried: .*dialogsum/.*dialogsum.train.json\(l\).*cylnlp/dialogsum", "dialogsum", tmp_path
    )
    fails(r"woz_train_en.json\(l\).*nmrksic/neural-belief-tracker", "woz", tmp_path)
    fails(
        r"'woz' reads files, but data.data_dir is not set. Set data.data_dir to .*the folder that"
        r" holds woz/",
        "woz",
        None,
    )
    fails(
        r"Tried: .*ft-training_set.*math_10k.json\(l\).*AGI-Edgerunners/LLM-Adapters",
        "math_10k",
        tmp_path,
        "train",
    )
    write_questions(tmp_path / "test.json", ["a"])
    # A file of that name, but not in a folder of the task's.
    fails(r"Tried: .*AddSub", "addsub", tmp_path)
    fails(r"test.json' is a file. Set data.data_dir to", "addsub", tmp_path / "test.json")


def test_a_test_only_task_says_so(tmp_path):
    (tmp_path / "piqa").mkdir()
    write_questions(tmp_path / "piqa" / "test.json", ["a"])
    for split in ("train", "validation"):
        fails(
            r"no train file beside \S+test.json. .*LLM-Adapters.* has none for this task, only test"
            r" rows: train on another",
            "piqa",
            tmp_path,
            split,
        )
    assert prompts_of("test", tmp_path, "piqa") == ["a"]


@pytest.mark.parametrize(
    "below", ["", "AQuA", "dataset/AQuA", "llm_adapters/dataset/AQuA", "llm_adapters/AQuA"]
)
def test_the_folder_of_a_task_is_found(tmp_path, below):
    root = tmp_path / "aqua"
    (root / below).mkdir(parents=True)
    write_questions(root / below / "test.jsonl", ["q"], answer="B")
    # For below="", root is the folder itself, in another case.
    assert prompts_of("test", root, "aqua") == ["q"]


def test_gsm8k_as_published_comes_before_the_other_form(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "dataset" / "gsm8k").mkdir(parents=True)
    write_questions(tmp_path / "dataset" / "gsm8k" / "test.json", ["LLM-Adapters"])
    assert prompts_of("test", tmp_path, "gsm8k") == ["LLM-Adapters"]
    (tmp_path / "gsm8k" / "test.jsonl").write_text(
        json.dumps({"question": "published", "answer": "#### 1"})
    )
    assert prompts_of("test", tmp_path, "gsm8k") == ["published"]


def test_named_folders_come_before_the_directory_itself(tmp_path):
    write_questions(tmp_path / "test.json", ["stray"])
    assert prompts_of("test", tmp_path, "gsm8k") == ["stray"]  # in a directory of any other name
    (tmp_path / "gsm8k").mkdir()
    write_questions(tmp_path / "gsm8k" / "test.json", ["named"])
    assert (
        prompts_of("test", tmp_path, "gsm8k")
        == prompts_of("test", tmp_path / "gsm8k", "gsm8k")
        == ["named"]
    )
    assert prompts_of("test", tmp_path) == ["stray"]


@pytest.mark.parametrize("folder", ["AddSub", "addsub", "ARC-Easy"])
def test_the_folder_of_another_task_is_not_read(tmp_path, folder):
    root = tmp_path / folder
    root.mkdir()
    write_questions(root / "test.json", ["another's"])
    fails(
        rf"no train, validation or test file in .*Tried: \S+/{folder}/gsm8k, \S+, \S+,"
        r" \S+/llm_adapters/gsm8k\. .*unless",
        "gsm8k",
        root,
    )
    assert prompts_of("test", root) == ["another's"]
    write_questions(root / "math_10k.json", ["a"])
    fails(r"Tried: \S+/ft-training_set, ", "math_10k", root)


def test_training_files_are_found_by_name_or_given(tmp_path):
    (tmp_path / "ft-training_set").mkdir()
    path = tmp_path / "ft-training_set" / "commonsense_15k.json"
    write_questions(path, [f"q{i}" for i in range(40)])
    for given in (tmp_path, path.parent, path):
        assert {split: len(prompts_of(split, given, "commonsense_15k")) for split in SPLITS} == {
            "train": 32,
            "validation": 4,
            "test": 4,
        }


def test_a_malformed_row_is_named_through_the_task(tmp_path):
    (tmp_path / "test.jsonl").write_text(
        '{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n'
    )
    with pytest.raises(ConfigError, match=r"test.jsonl, row 2: no field 'answer'"):
        load_examples("gsm8k", "test", DataConfig(data_dir=str(tmp_path)))
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"test.jsonl: no rows"):
        load_examples("gsm8k", "test", DataConfig(data_dir=str(tmp_path)))
