"""Builders of file formats, and public datasets by name: rows in, the prompts and answers of the
tasks out.
"""

import importlib.util
import json
import re
import sys
import types

import pytest
import tensorflow_datasets as tfds
from support.runs import real_data

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.builders import public, wording
from zflora_jax.data.builders.formats import (
    DialogueJson,
    HellaswagJson,
    MawpsJson,
    SummaryJson,
    WozJson,
    read_rows,
)
from zflora_jax.data.tasks import TASKS, Example, load_examples


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "tfds"))


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(task, split, directory=None):
    return list(load_examples(task, split, DataConfig(data_dir=directory and str(directory))))


# --- files ----------------------------------------------------------------------------------------

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
    assert not task.score(task.parse("price range: cheap; area: east"), examples[1].answer)


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


# --- wording --------------------------------------------------------------------------------------

PATTERNS = {
    "boolq": r"Please answer .*?, question: (.*)\?\n\nAnswer format: true/false",
    "piqa": r"Please choose .*?: (.*)\n\nSolution1: (.*)\n\nSolution2: (.*)\n\nAnswer format: .*",
    "social_i_qa": (
        r"Please choose .*?: (.*)\n\nAnswer1: (.*) Answer2: (.*) Answer3: (.*)\n\nAnswer format: .*"
    ),
    "hellaswag": (
        r"Please choose .*?: (.*?): (.*)\n\nEnding1: (.*) Ending2: (.*) Ending3: (.*) Ending4:"
        r" (.*)\n\nAnswer format: .*"
    ),
    "winogrande": r"Please choose .*?: (.*)\n\nOption1: (.*) Option2: (.*) Answer format: .*",
    "ARC-Easy": (
        r"Please choose .*?: (.*)\n\nAnswer1: (.*) Answer2: (.*) Answer3: (.*?)(?: Answer4:"
        r" (.*?))?(?: Answer5: (.*?))?\n\nAnswer format: .*"
    ),
}
PATTERNS |= {"ARC-Challenge": PATTERNS["ARC-Easy"], "openbookqa": PATTERNS["ARC-Easy"]}
WORDINGS = {"piqa": wording.piqa, "winogrande": wording.winogrande}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_wording_gives_llm_adapters_rows_byte_for_byte(name):
    """Every test row taken apart and put together again."""
    for row in read_rows(real_data(f"llm_adapters/dataset/{name}/test.json")):
        parts = [
            part
            for part in re.fullmatch(PATTERNS[name], row["instruction"], re.DOTALL).groups()
            if part is not None
        ]
        if name == "boolq":
            made = wording.boolq(parts[0], row["answer"] == "true")
        elif name == "hellaswag":
            made = wording.hellaswag(parts[0], parts[1], parts[2:], int(row["answer"][-1]) - 1)
        else:
            made = WORDINGS.get(name, wording.answer_choice)(
                parts[0], parts[1:], int(row["answer"][-1]) - 1
            )
        assert made == row


# --- public datasets ------------------------------------------------------------------------------

# Rows as TFDS decodes them from the features of its own builders.
TFDS_ROWS = {
    "boolq": (
        {"question": "is ice cold", "answer": True, "passage": "p", "title": "t"},
        "question: is ice cold?\n\nAnswer format: ",
        "true",
    ),
    "piqa": (
        {"goal": "Cut.", "sol1": "a", "sol2": "b", "label": 1, "id": ""},
        "Cut.\n\nSolution1: a\n\nSolution2: b\n\nAnswer",
        "solution2",
    ),
    "arc_easy": (
        {
            "question": "Q?",
            "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
            "answerKey": "C",
            "id": "1",
        },
        "question: Q?\n\nAnswer1: x Answer2: y Answer3: z\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "openbookqa": (
        {
            "question": {
                "stem": "S is",
                "choice_A": "a",
                "choice_B": "b",
                "choice_C": "c",
                "choice_D": "d",
            },
            "fact1": "",
            "humanScore": 1.0,
            "clarity": 1.0,
            "turkIdAnonymized": "",
            "answerKey": "B",
        },
        "S is\n\nAnswer1: a Answer2: b Answer3: c Answer4: d\n\n",
        "answer2",
    ),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "context": "he",
            "endings": ["a", "b", "c", "d"],
            "label": 3,
            "split_type": "",
            "source_id": "",
        },
        "sentence: Baking: he\n\nEnding1: a Ending2: b",
        "ending4",
    ),
    "winogrande": (
        {"sentence": "_ won.", "option1": "A", "option2": "B", "label": "2"},
        "_ won.\n\nOption1: A Option2: B Answer format",
        "option2",
    ),
    "gsm8k": (
        {
            "question": "How many?",
            "answer": "1+1=<<1+1=2>>2\n#### 2",
            "annotation": "",
            "short_answer": "",
        },
        "How many?",
        "2",
    ),
}
TFDS_ROWS["arc_challenge"] = TFDS_ROWS["arc_easy"]


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(public, "_require_network", lambda *args: None)


@pytest.mark.parametrize("task", TFDS_ROWS)
def test_rows_of_tfds_become_llm_adapters_rows(task, no_download):
    row, prompt, answer = TFDS_ROWS[task]

    dataset = public.PUBLIC[task]

    def as_data_source(builder, split, **_):
        """Rows encoded and decoded by the features of the real builder, as a prepared dataset gives
        them; the test rows are all `row`.
        """
        features, name = (
            builder.info.features,
            next(key for key in ("question", "goal", "context", "sentence") if key in row),
        )

        def decoded(i):
            changed = row[name] | {"stem": f"{i}"} if isinstance(row[name], dict) else f"{i}"
            kept = row if split == dataset.splits["test"] else row | {name: changed}
            return features.deserialize_example_np(
                features.serialize_example(features.encode_example(kept))
            )

        assert split in dataset.splits.values()
        return [decoded(i) for i in range(30)]

    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        examples = load(task, "test")
        sizes = (len(load(task, "train")), len(load(task, "validation")))
    # Held out of train where the published rows are the test rows.
    assert sizes == ((30, 30) if "validation" in dataset.splits else (27, 3))
    assert len(examples) == 30
    assert prompt in examples[0].prompt and examples[0].answer == answer
    assert (answer in examples[0].target) and (
        task == "gsm8k" or examples[0].target in examples[0].options
    )


def test_random_rows_of_the_features_are_read(no_download):
    with tfds.testing.mock_data(num_examples=40):
        for task in ("boolq", "piqa", "openbookqa", "winogrande"):
            examples = load(task, "test")
            assert len(examples) == 40 and all(e.target in e.options for e in examples)
            # Held out of train where the published rows are the test rows.
            assert len(load(task, "validation")) >= 4


def test_every_public_task_names_its_source():
    assert {
        task.name for task in TASKS.values() if getattr(task, "source", None) and task.source.public
    } == set(public.PUBLIC)


def test_without_network_the_message_says_so(monkeypatch):
    import requests

    def head(*args, **kwargs):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", head)
    message = (
        r"'boolq': data.data_dir is not set, and the TFDS dataset 'bool_q' is not in \S+ and cannot"
        r" be downloaded: no connection to storage"
    )
    with pytest.raises(
        ConfigError,
        match=message
        + r".*set data.data_dir \(--data-dir\) to the folder that holds boolq/.*LLM-Adapters",
    ):
        load("boolq", "test")


def test_tfds_downloads_and_prepares_without_tensorflow(tmp_path, no_download, monkeypatch):
    """Through a web server of this test, in place of the published one."""
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    rows = [
        {"question": f"is {i} even", "passage": "", "answer": i % 2 == 0, "title": ""}
        for i in range(20)
    ]
    write(tmp_path / "web" / "train.jsonl", *rows)
    write(tmp_path / "web" / "dev.jsonl", *rows[:3])
    from tensorflow_datasets.datasets.bool_q import bool_q_dataset_builder as module

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path / "web"))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name, file in (("_TRAIN_DOWNLOAD_URL", "train"), ("_VALIDATION_DOWNLOAD_URL", "dev")):
            monkeypatch.setattr(module, name, f"http://127.0.0.1:{server.server_port}/{file}.jsonl")
        examples = load("boolq", "test")
        server.shutdown()
    assert sorted((e.prompt.split("question: ")[1][:9], e.answer) for e in examples) == [
        ("is 0 even", "true"),
        ("is 1 even", "false"),
        ("is 2 even", "true"),
    ]
    assert len(load("boolq", "train")) == 18  # prepared once, the server is gone
    assert "tensorflow" not in sys.modules


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="tensorflow is installed"
)
@pytest.mark.parametrize("task", ["cnn_dailymail", "xsum", "samsum"])
def test_the_builders_of_tfds_that_are_passed_over_need_tensorflow(task, tmp_path):
    """If this fails, that task can come from TFDS like the others."""
    builder = getattr(
        importlib.import_module(f"tensorflow_datasets.summarization.{task}"),
        task.title().replace("_", ""),
    )(data_dir=tmp_path)
    path = str(write(tmp_path / "1.data", {}))
    source = {
        "cnn_dailymail": {"files": {"cnn": [path]}},
        "xsum": {"split_ids": ["1"], "path": str(tmp_path)},
        "samsum": {"path": path},
    }
    with pytest.raises(ImportError, match="tensorflow"):
        list(builder._generate_examples(**source[task]))


HUB_ROWS = {
    "social_i_qa": (
        {
            "context": "Al ran.",
            "question": "Why?",
            "answerA": "a",
            "answerB": "b",
            "answerC": "c",
            "label": "2",
        },
        "answer2",
    ),
    "cnn_dailymail": ({"article": "Long.", "highlights": "Short."}, "Short."),
    "xsum": ({"document": "Long.", "summary": "Short."}, "Short."),
    "samsum": ({"dialogue": "Long.", "summary": "Short."}, "Short."),
    "dialogsum": ({"dialogue": "Long.", "summary": "Short."}, "Short."),
    "dailydialog": ({"dialog": ["Hi.", "Hello."]}, "Hello."),
    "multiwoz": ({"turns": {"speaker": [0, 1], "utterance": ["Hi.", "Hello."]}}, "Hello."),
}


@pytest.mark.parametrize("task", HUB_ROWS)
def test_rows_of_the_hub(task, monkeypatch):
    row, said = HUB_ROWS[task]
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return [row] * 3

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    examples = load(task, "test")
    assert len(examples) == 3 and said in examples[0].target
    (name, config), options = asked[0]
    assert (
        name == public.PUBLIC[task].name and options["split"] == public.PUBLIC[task].splits["test"]
    )
    if task == "social_i_qa":
        assert (
            "question: Al ran. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n" in examples[0].prompt
        )
    if task == "cnn_dailymail":
        assert config == "3.0.0"


def test_errors_of_the_hub_are_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(
        ConfigError,
        match=(
            r"'xsum': data.data_dir is not set, and the dataset 'EdinburghNLP/xsum' .*pip install"
            r" datasets.*EdinburghNLP"
        ),
    ):
        load("xsum", "test")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        ConfigError,
        match=r"'xsum'.*cannot be read from the Hugging Face hub: ConnectionError: offline",
    ):
        load("xsum", "test")
