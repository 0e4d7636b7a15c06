"""Builders read file formats: rows in, the prompts and answers of the tasks out; malformed rows are
refused with their place.
"""

import re

import pytest
import tensorflow_datasets as tfds
from support.tasks import load, write

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.builders import steps
from zflora_jax.data.builders.formats import (
    DialogueJson,
    HellaswagJson,
    MawpsJson,
    SummaryJson,
    WozJson,
)
from zflora_jax.data.tasks import TASKS, Example, load_examples

pytestmark = pytest.mark.usefixtures("own_data_cache")

HELLASWAG = {
    "activity_label": "Baking",
    "ctx": "A man mixes. he",
    "endings": ["sings.", "bakes.", "runs.", "sits."],
    "label": 1,
}
TURNS = [
    {
        "system_transcript": "",
        "transcript": "A cheap\n place?",
        "belief_state": [{"act": "inform", "slots": [["price range", "cheap"]]}],
    },
    {
        "system_transcript": "Which area?",
        "transcript": "East. Phone?",
        "belief_state": [
            {"act": "request", "slots": [["slot", "phone"]]},
            {"act": "inform", "slots": [["price range", "cheap"]]},
            {"act": "inform", "slots": [["area", "east"]]},
            {"act": "inform", "slots": [["area", "east"]]},
        ],
    },
    {"system_transcript": "123", "transcript": "Bye", "belief_state": []},
]
WOZ = {"dialogue_idx": 7, "dialogue": TURNS}


def test_hellaswag_as_published(tmp_path):
    write(tmp_path / "hellaswag" / "hellaswag_val.jsonl", HELLASWAG)
    write(
        tmp_path / "hellaswag" / "hellaswag_train.jsonl",
        *[HELLASWAG | {"ctx": str(i), "label": "3"} for i in range(20)],
    )
    (example,) = load("hellaswag", "test", tmp_path)
    assert (
        example.prompt
        == "Please choose the correct ending to complete the given sentence: Baking: A man mixes."
        " he\n\nEnding1: sings. Ending2: bakes. Ending3: runs. Ending4: sits.\n\nAnswer format:"
        " ending1/ending2/ending3/ending4"
    )
    assert (example.target, example.answer) == ("the correct answer is ending2", "ending2")
    assert example.options == tuple(f"the correct answer is ending{i}" for i in (1, 2, 3, 4))
    assert (
        len(load("hellaswag", "train", tmp_path)) == 18
        and len(load("hellaswag", "validation", tmp_path)) == 2
    )
    assert load("hellaswag", "train", tmp_path)[0].answer == "ending4"


def test_dialogsum_has_one_reference_or_three(tmp_path):
    write(
        tmp_path / "dialogsum" / "dialogsum.dev.jsonl",
        {"dialogue": "#Person1#: Hi.", "summary": "A greeting. ", "topic": "x"},
    )
    write(
        tmp_path / "dialogsum" / "dialogsum.test.jsonl",
        {
            "dialogue": "#Person1#: Hi.",
            "summary1": "One.",
            "summary2": "Two.",
            "summary3": "Three.",
        },
    )
    (one,), (three,) = (
        load("dialogsum", "validation", tmp_path),
        load("dialogsum", "test", tmp_path),
    )
    assert one == Example(
        "Summarize the following dialogue.",
        "A greeting.",
        "",
        "#Person1#: Hi.",
        (),
        ("A greeting.",),
        True,
    )
    assert (three.target, three.references) == ("One.", ("One.", "Two.", "Three."))
    assert TASKS["dialogsum"].gold(three) == "One."


@pytest.mark.parametrize(
    ("task", "row", "what"),
    [
        ("cnn_dailymail", {"article": "Long.", "highlights": "Short."}, "article"),
        ("xsum", {"document": "Long.", "summary": "Short."}, "article"),
        ("samsum", {"dialogue": "Long.", "summary": "Short."}, "dialogue"),
    ],
)
def test_other_summaries(tmp_path, task, row, what):
    write(tmp_path / task / "val.json", row)
    assert load(task, "validation", tmp_path) == [
        Example(f"Summarize the following {what}.", "Short.", "", "Long.", (), ("Short.",), True)
    ]


def test_woz_asks_for_the_state_after_each_user_turn(tmp_path):
    write(tmp_path / "woz" / "woz_test_en.json", WOZ)
    task, examples = TASKS["woz"], load("woz", "test", tmp_path)
    assert [e.target for e in examples] == [
        "price range: cheap",
        "area: east; price range: cheap; request: phone",
        "none",
    ]
    assert examples[0].input == "User: A cheap place?"
    assert examples[1].input == "User: A cheap place?\nSystem: Which area?\nUser: East. Phone?"
    assert all(
        e.answer == e.target and e.references == (e.target,) and not e.document for e in examples
    )
    assert task.score(
        task.parse("request: phone; Price Range: cheap; area: east"), examples[1].answer
    )
    assert task.score(task.parse("price range: cheap; area: east"), examples[1].answer)
    assert not task.score(task.parse("price range: cheap; request: phone"), examples[1].answer)


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (
            "dailydialog",
            {"dialog": ["Hi .", "Hello  you .", "Bye .", " Bye ."], "act": [1, 1, 1, 1]},
        ),
        (
            "multiwoz",
            {
                "turns": [
                    {"speaker": "USER", "utterance": u}
                    for u in ("Hi .", "Hello  you .", "Bye .", " Bye .")
                ]
            },
        ),
    ],
)
def test_dialogues_ask_for_each_reply(tmp_path, task, row):
    write(tmp_path / task / "test.jsonl", row)
    first, second = load(task, "test", tmp_path)
    assert (first.input, first.target, first.answer, first.references) == (
        "Speaker 1: Hi .",
        "Hello you .",
        "",
        ("Hello you .",),
    )
    assert (second.input, second.target) == (
        "Speaker 1: Hi .\nSpeaker 2: Hello you .\nSpeaker 1: Bye .",
        "Bye .",
    )


def test_rows_of_one_dialogue_stay_on_one_side_of_a_hold_out(tmp_path):
    write(
        tmp_path / "woz" / "woz_train_en.json",
        *[
            WOZ | {"dialogue_idx": i, "dialogue": [TURNS[0] | {"transcript": f"{i}"}, *TURNS[1:]]}
            for i in range(40)
        ],
    )
    first = [
        {example.input.splitlines()[0] for example in load("woz", split, tmp_path)}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, first)) == 40 and all(first)


def test_mawps_equations_are_worked_solutions(tmp_path):
    write(
        tmp_path / "mawps" / "trainset.json",
        *[
            {"original_text": f"{i} ? ", "equation": "X=(1.0+1.0)", "ans": "2.0" if i else 2.0}
            for i in range(20)
        ],
    )
    assert {(e.target, e.answer) for e in load("mawps", "train", tmp_path)} == {
        ("X=(1.0+1.0)\nThe answer is 2.0.", "2.0")
    }


def bad(changes, row=HELLASWAG):
    return {key: value for key, value in (row | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("builder", "row", "message"),
    [
        (
            HellaswagJson,
            bad({"ctx": None}),
            (
                r"row 2: no field 'ctx', the row has 'activity_label', .*Expected activity_label,"
                r" ctx, endings, label"
            ),
        ),
        (HellaswagJson, bad({"endings": "a"}), r"row 2: field 'endings' must be a list, got str"),
        (
            HellaswagJson,
            bad({"endings": ["a", 1]}),
            r"row 2: field 'endings' must be a list of strings",
        ),
        (
            HellaswagJson,
            bad({"label": 4}),
            r"row 2: label=4 is not the index of one of the 4 endings",
        ),
        (HellaswagJson, bad({"label": ""}), r"row 2: label='' is not"),
        (SummaryJson, {"dialogue": "a"}, r"row 2: no field 'summary'"),
        (
            SummaryJson,
            {"summary": "a"},
            r"row 2: no field 'dialogue'.*Expected dialogue, article or document",
        ),
        (
            SummaryJson,
            {"dialogue": "a", "summary1": "b", "summary2": " "},
            r"row 2: the dialogue or a summary of it is empty",
        ),
        (
            SummaryJson,
            {"article": 3, "summary": "b"},
            r"row 2: field 'article' must be a string, got int 3",
        ),
        (WozJson, {"dialogue": "a"}, r"row 2: field 'dialogue' must be a list"),
        (WozJson, {"dialogue": ["a"]}, r"row 2, turn 1: expected an object, got str"),
        (
            WozJson,
            {"dialogue": [TURNS[0], bad({"transcript": None}, TURNS[1])]},
            r"row 2, turn 2: no field 'transcript'",
        ),
        (
            WozJson,
            {"dialogue": [TURNS[0] | {"belief_state": [{"act": "inform"}]}]},
            r"row 2, turn 1: 'belief_state' must be a list of \{act",
        ),
        (DialogueJson, {"text": "a"}, r"row 2: no field 'dialog'"),
        (DialogueJson, {"turns": [{"speaker": "USER"}]}, r"row 2: every turn must be a string"),
        (
            MawpsJson,
            {"original_text": "a", "equation": "X=1", "ans": "one"},
            r"row 2: field 'ans' must be a number, got 'one'",
        ),
        (MawpsJson, [], r"row 2: expected an object, got list"),
    ],
)
def test_malformed_rows_are_refused_with_their_place(tmp_path, builder, row, message):
    good = {
        HellaswagJson: HELLASWAG,
        SummaryJson: {"dialogue": "a", "summary": "b"},
        WozJson: WOZ,
        DialogueJson: {"dialog": ["a", "b"]},
    }
    path = write(
        tmp_path / "rows.jsonl",
        good.get(builder, {"original_text": "a", "equation": "X=1", "ans": 1.0}),
        row,
    )
    with pytest.raises(ConfigError, match=f"rows.jsonl, {message}"):
        list(builder.read(str(path)))


def test_files_without_rows(tmp_path):
    with pytest.raises(ConfigError, match=r"no rows"):
        list(SummaryJson.read(str(write(tmp_path / "rows"))))
    with pytest.raises(ConfigError, match=r"no dialogue has a second turn"):
        list(DialogueJson.read(str(write(tmp_path / "rows", {"dialog": ["a"]}))))


def test_the_builders_do_not_take_the_names_of_public_datasets():
    """TFDS finds its own hellaswag, with ours imported above."""
    __import__("tensorflow_datasets.text.hellaswag")
    assert (
        type(tfds.builder("hellaswag", try_gcs=False)).__module__
        == "tensorflow_datasets.text.hellaswag"
    )


def test_problems_of_several_steps_are_worked_rightly():
    """A row's steps give its answer, row i has 1 + i % LEVELS of them, and none occurs twice."""
    rows = steps.generate({"train": 400, "test": 100})
    assert [len(rows[split]) for split in ("train", "test")] == [400, 100]
    for split in rows.values():
        for i, row in enumerate(split):
            *worked, last = re.findall(r"[^.]+\.", row["rationale"])
            assert len(worked) == 1 + i % steps.LEVELS
            have = int(re.search(r"has (\d+)", row["question"]).group(1))
            for text in worked:
                a, sign, b, result = re.fullmatch(
                    r" ?(\d+) ([-+*/]) (\d+) = (\d+)\.", text
                ).groups()
                assert int(a) == have and f" {b} " in f"{row['question']} ".replace(".", " ")
                have = {"+": have + int(b), "-": have - int(b), "*": have * int(b)}.get(
                    sign, have // int(b)
                )
                assert have == int(result) and 2 <= have <= steps.LARGEST
            assert last == f" The answer is {have}." and row["answer"] == str(have)
    questions = [row["question"] for split in rows.values() for row in split]
    assert len(set(questions)) == 500 and steps.generate({"train": 400, "test": 100}) == rows


def test_no_problem_is_drawn_twice(monkeypatch):
    """Where the same ones come up: of two names and one thing, 2000 problems of a step."""
    monkeypatch.setattr(steps, "NAMES", ("Ada", "Ben"))
    monkeypatch.setattr(steps, "THINGS", ("beads",))
    monkeypatch.setattr(steps, "LEVELS", 1)
    rows = steps.generate({"train": 1500, "test": 500})
    assert len({row["question"] for split in rows.values() for row in split}) == 2000


def test_problems_of_several_steps_are_a_task():
    example = load_examples("arithmetic_steps", "test", DataConfig())[4]
    task = TASKS["arithmetic_steps"]
    assert task.score(task.parse(example.target), example.answer)
    assert example.target.count("=") == 5
