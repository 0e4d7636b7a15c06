"""Published rows, of files, of TFDS and of the hub, become the prompts and answers of tasks;
malformed ones are refused with their place.
"""

import hashlib
import json
import sys
import types
from unittest.mock import Mock

import pytest
import requests
import tensorflow_datasets as tfds
from support.tasks import load, write

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import prepared, public
from zflora_jax.data.builders.files import table_rows
from zflora_jax.data.builders.own import read_rows
from zflora_jax.data.tasks import TASKS, Example

pytestmark = pytest.mark.usefixtures("own_data_cache")

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


def woz_turn(system, user, **acts):
    state = [{"act": act, "slots": slots} for act, slots in acts.items()]
    return {"system_transcript": system, "transcript": user, "belief_state": state}


CHEAP, EAST = ["price range", "cheap"], ["area", "east"]
TURNS = [
    woz_turn("", "A cheap\n place?", inform=[CHEAP]),
    woz_turn("Area?", "East. Phone?", request=[["slot", "phone"]], inform=[CHEAP, EAST, EAST]),
    woz_turn("123", "Bye"),
]
WOZ = {"dialogue_idx": 7, "dialogue": TURNS}

# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llm_adapters_and_gsm8k(suffix, tmp_path):
    rows = [GSM8K, ADAPTERS, ADAPTERS | {"output": ""}]
    rows += [ADAPTERS | {"input": "a\u2028b", "output": "Apples. A: no."}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = f"[{','.join(lines)}]" if suffix == "json" else "\n".join(lines) + "\n\n"
    path = tmp_path / "gsm8k" / f"test.{suffix}"
    path.parent.mkdir()
    path.write_text(text, "utf-8")
    assert load("gsm8k", "test", tmp_path) == [
        Example("How many?", "6*2=12 and 1,000 more: 12+1,000=1,012.\nThe answer is 1012.", "1012"),
        Example("How\nmany?", "Two and two. The answer is 4.", "4.0"),
        Example("How\nmany?", "The answer is 4.0.", "4.0"),
        Example("How\nmany?", "Apples. A: no.", "4.0", "a\u2028b"),
    ]


UTTERANCES = ["Hi .", "Hello  you .", "Bye .", " Bye ."]
SHORT = {"summary": "Short."}


def summary(what, *texts):
    prompt = f"Summarize the following {what}."
    return Example(prompt, texts[0], "", "Long.", (), texts, document=True)


PROMPT = "Write the next reply of Speaker 2 in the following dialogue."
FIRST, SECOND = "Speaker 1: Hi .", "Hello you ."
BOTH = f"{FIRST}\nSpeaker 2: {SECOND}\nSpeaker 1: Bye ."
REPLIES = [
    Example(PROMPT, text, "", before, (), (text,))
    for before, text in ((FIRST, SECOND), (BOTH, "Bye ."))
]
CNN = {"article": "Long.", "highlights": "Short. "}
THREE = {"dialogue": "Long."} | {f"summary{i}": f"{i}." for i in (1, 2, 3)}
TURN_TABLE = [{"speaker": "USER", "utterance": utterance} for utterance in UTTERANCES]


@pytest.mark.parametrize(
    ("file", "row", "wanted"),
    [
        ("cnn_dailymail/test.json", CNN, [summary("article", "Short.")]),
        ("xsum/test.json", {"document": "Long."} | SHORT, [summary("article", "Short.")]),
        ("samsum/test.json", {"dialogue": "Long."} | SHORT, [summary("dialogue", "Short.")]),
        ("dialogsum/dialogsum.test.jsonl", THREE, [summary("dialogue", "1.", "2.", "3.")]),
        ("dailydialog/test.jsonl", {"dialog": UTTERANCES, "act": [1, 1, 1, 1]}, REPLIES),
        ("multiwoz/test.jsonl", {"turns": TURN_TABLE}, REPLIES),
    ],
)
def test_summaries_and_replies(file, row, wanted, tmp_path):
    write(tmp_path / file, row)
    assert load(file.split("/")[0], "test", tmp_path) == wanted


def test_woz_asks_for_the_state_after_each_user_turn(tmp_path):
    write(tmp_path / "woz" / "woz_test_en.json", WOZ)
    task, examples = TASKS["woz"], load("woz", "test", tmp_path)
    state = "area: east; price range: cheap; request: phone"
    assert [e.target for e in examples] == ["price range: cheap", state, "none"]
    assert examples[0].input == "User: A cheap place?"
    assert examples[1].input == "User: A cheap place?\nSystem: Area?\nUser: East. Phone?"
    assert all(e.answer == e.target and e.references == (e.target,) for e in examples)
    assert not any(e.document for e in examples)
    told = task.answers.parse("request: phone; Price Range: cheap; area: east")
    assert task.answers.score(told, examples[1].answer)


ROWS = {"llm_adapters": ADAPTERS, "gsm8k": GSM8K, "woz": WOZ}
ROWS |= {"summary": {"dialogue": "a", "summary": "b"}, "dialogue": {"dialog": ["a", "b"]}}
NO_SLOTS = TURNS[0] | {"belief_state": [{"act": "inform"}]}
NO_OUTPUT = {"output": " ", "answer": ""}


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("llm_adapters", {"output": None}, r"no field 'output', the row has"),
        ("llm_adapters", {"answer": 4}, r"'answer' must be a string, got int"),
        ("llm_adapters", {"instruction": " "}, r"the instruction \(or question\) is empty"),
        ("llm_adapters", NO_OUTPUT, r"'output' is empty and there is no 'answer'"),
        ("gsm8k", {"answer": "12"}, r"must end with '#### N', got '12'. Task 'rows' reads"),
        ("gsm8k", {"answer": None}, r"no field 'answer'.*Expected question, answer"),
        ("summary", {"dialogue": None}, r"no field 'dialogue'.*Expected dialogue, article or"),
        ("summary", {"summary1": " "}, r"a summary is empty"),
        ("woz", {"dialogue_idx": None}, r"no field 'dialogue_idx'"),
        ("woz", {"dialogue": ["a"]}, r"string indices must be.*Expected dialogue_idx and dialogue"),
        ("woz", {"dialogue": [NO_SLOTS]}, r"no field 'slots'.*belief_state, a list of \{act"),
        ("dialogue", {"turns": [{"speaker": "U"}]}, r"no field 'utterance'"),
        ("dialogue", {"dialog": ["a", 1]}, r"every turn must be a string"),
    ],
)
def test_malformed_rows_are_refused_with_their_place(tmp_path, format, changes, message):
    good = ROWS[format]
    bad = {key: value for key, value in (good | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=f"rows.jsonl, row 2: .*{message}"):
        list(read_rows(table_rows(write(tmp_path / "rows.jsonl", good, bad)), format))


def test_prepared_rows_follow_the_content_of_the_file(tmp_path, monkeypatch):
    """And the code that reads it: its updates may give other rows of the same file."""

    def read(path, answer):
        write(path, ADAPTERS | {"answer": answer})
        [example] = load("gsm8k", "test", path.parent)
        return example.answer, len([*(tmp_path / "tfds" / "rows").iterdir()])

    path = tmp_path / "gsm8k" / "test.jsonl"
    assert read(path, "4") == ("4", 1) and read(path, "5") == ("5", 2)
    assert read(tmp_path / "moved" / "gsm8k" / "test.jsonl", "4") == ("4", 2)
    monkeypatch.setattr(prepared, "_code", lambda: hashlib.sha256(b"another"))
    assert read(path, "5") == ("5", 3)


# --- public datasets ------------------------------------------------------------------------------

# Rows of TFDS ("%" is another number in each), and the splits that are read for the task's.
LETTERS = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
STEM = {"stem": "S% is"} | {f"choice_{letter}": letter.lower() for letter in "ABCD"}
FACTS = {"fact1": "", "humanScore": 1.0, "clarity": 1.0, "turkIdAnonymized": ""}
BAKING = {"activity_label": "Baking", "context": "he %", "split_type": "", "source_id": ""}
ALL, LABELLED = ("train", "validation", "test"), ("train", "train", "validation")
CHOOSE, FORMAT = "Please choose the correct", "Answer format:"
TFDS_ROWS = {
    "boolq": (
        {"question": "is % cold", "answer": True, "passage": "p", "title": "t"},
        "Please answer the following question with true or false, question: is % cold?\n\n"
        f"{FORMAT} true/false",
        ("true", LABELLED),
    ),
    "piqa": (
        {"goal": "Cut %.", "sol1": "a", "sol2": "b", "label": 1, "id": ""},
        f"{CHOOSE} solution to the question: Cut %.\n\nSolution1: a\n\nSolution2: b\n\n"
        f"{FORMAT} solution1/solution2",
        ("solution2", LABELLED),
    ),
    "hellaswag": (
        BAKING | {"endings": list("abcd"), "label": 3},
        f"{CHOOSE} ending to complete the given sentence: Baking: he %\n\nEnding1: a Ending2: b"
        f" Ending3: c Ending4: d\n\n{FORMAT} ending1/ending2/ending3/ending4",
        ("ending4", LABELLED),
    ),
    "winogrande": (
        {"sentence": "_ won %.", "option1": "A", "option2": "B", "label": "2"},
        f"{CHOOSE} answer to fill in the blank to complete the given sentence: _ won %.\n\n"
        f"Option1: A Option2: B {FORMAT} option1/option2",
        ("option2", ("train_xl", "train_xl", "validation")),
    ),
    "arc_easy": (
        {"question": "Q%?", "choices": LETTERS, "answerKey": "C", "id": "1"},
        f"{CHOOSE} answer to the question: Q%?\n\nAnswer1: x Answer2: y Answer3: z\n\n"
        f"{FORMAT} answer1/answer2/answer3",
        ("answer3", ALL),
    ),
    "openbookqa": (
        FACTS | {"question": STEM, "answerKey": "B"},
        f"{CHOOSE} answer to the question: S% is\n\nAnswer1: a Answer2: b Answer3: c Answer4: d"
        f"\n\n{FORMAT} answer1/answer2/answer3/answer4",
        ("answer2", ALL),
    ),
    "gsm8k": (
        GSM8K | {"question": "How many %?", "annotation": "", "short_answer": ""},
        "How many %?",
        ("1012", ("train", "train", "test")),
    ),
}
TFDS_ROWS["arc_challenge"] = TFDS_ROWS["arc_easy"]


@pytest.mark.parametrize("task", TFDS_ROWS)
def test_rows_of_tfds_are_worded_as_llm_adapters_words_them(task, monkeypatch):
    """Encoded and decoded by the features of the real builders, as prepared datasets give them."""
    row, prompt, (answer, wanted) = TFDS_ROWS[task]
    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: None)
    opened = []

    def as_data_source(builder, split, **_):
        opened.append(split)
        rows = [json.loads(json.dumps(row).replace("%", str(i))) for i in range(30)]
        features = builder.info.features
        encoded = [features.serialize_example(features.encode_example(row)) for row in rows]
        return [features.deserialize_example_np(row) for row in encoded]

    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        found = [load(task, split) for split in ALL]
    assert tuple(opened) == wanted  # validation is held out of train where it is the test split
    assert [*map(len, found)] == ([30, 30, 30] if wanted == ALL else [27, 3, 30])
    example, options = found[2][0], prompt.partition(f"{FORMAT} ")[2].split("/")
    assert (example.prompt, example.answer) == (prompt.replace("%", "0"), answer)
    assert example.options == tuple(f"the correct answer is {x}" for x in options if x)
    assert task == "gsm8k" or example.target == f"the correct answer is {answer}"


@pytest.mark.parametrize("task", ["boolq", "gsm8k"])
def test_without_a_network_the_message_comes_at_once(task, monkeypatch):
    monkeypatch.setattr(requests, "head", Mock(side_effect=requests.ConnectionError))
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", None)  # not called
    message = rf"'{task}': the TFDS dataset .* is not in \S+ and .* no connection to https://.*com"
    with pytest.raises(ConfigError, match=message):
        load(task, "test")


SIQA = {"context": "Al.", "question": "Why?", "label": "2"} | {f"answer{x}": x for x in "ABC"}
HUB_ROWS = {
    "social_i_qa": (SIQA, "question: Al. Why?\n\nAnswer1: A Answer2: B Answer3: C\n\n", "er2"),
    "cnn_dailymail": ({"article": "Long.", "highlights": "Short."}, "article", "Short."),
    "xsum": ({"document": "Long.", "summary": "Short."}, "article", "Short."),
    "samsum": ({"dialogue": "", "summary": "Short."}, "dialogue", "Short."),  # one is empty there
    "dialogsum": ({"dialogue": "Long.", "summary": "Short."}, "dialogue", "Short."),
    "dailydialog": ({"dialog": ["Hi.", "Hello."]}, "reply", "Hello."),
    "multiwoz": ({"turns": {"speaker": [0, 1], "utterance": ["Hi.", "Hello."]}}, "reply", "Hello."),
}


@pytest.mark.parametrize("task", HUB_ROWS)
def test_rows_of_the_hub(task, monkeypatch):
    row, prompt, target = HUB_ROWS[task]
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [row] * 3

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    examples, dataset = load(task, "test"), public.PUBLIC[task]
    assert len(examples) == 3 and prompt in examples[0].prompt and target in examples[0].target
    (name, config), options = asked[0]
    assert name == dataset.source.name and options["split"] == dataset.splits["test"]
    assert config == ("3.0.0" if task == "cnn_dailymail" else None)


@pytest.mark.parametrize(
    ("module", "message"),
    [("broken", "ConnectionError: offline"), (None, "ModuleNotFoundError.*pip install datasets")],
)
def test_errors_of_the_hub_are_explained(module, message, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline")

    module = module and types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)  # None: as if it were not installed
    with pytest.raises(ConfigError, match=rf"'xsum': the dataset .* read from the .*: {message}"):
        load("xsum", "test")
