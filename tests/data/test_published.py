"""Published rows, of files, of TFDS and of the hub, become the prompts and answers of tasks;
malformed ones are refused with their place.
"""

import functools
import hashlib
import http.server
import importlib
import json
import re
import sys
import threading
import types

import pytest
import tensorflow_datasets as tfds
from support.runs import real_data
from support.tasks import load, write

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import prepared, public
from zflora_jax.data.builders.files import table_rows
from zflora_jax.data.builders.published import FORMATS, answers, read_file
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
HELLASWAG = {
    "activity_label": "Baking",
    "ctx": "A man mixes. he",
    "endings": ["sings.", "bakes.", "runs.", "sits."],
    "label": 1,
}
MAWPS = {"original_text": "a ? ", "equation": "X=(1.0+1.0)", "ans": 2.0}
SUMMARY, DIALOGUE = {"dialogue": "a", "summary": "b"}, {"dialog": ["a", "b"]}


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


def test_hellaswag(tmp_path):
    folder = tmp_path / "hellaswag"
    write(folder / "hellaswag_val.jsonl", HELLASWAG)
    train = (HELLASWAG | {"ctx": str(i), "label": "3"} for i in range(20))
    write(folder / "hellaswag_train.jsonl", *train)
    (example,) = load("hellaswag", "test", tmp_path)
    assert (
        example.prompt
        == "Please choose the correct ending to complete the given sentence: Baking: A man mixes."
        " he\n\nEnding1: sings. Ending2: bakes. Ending3: runs. Ending4: sits.\n\nAnswer format:"
        " ending1/ending2/ending3/ending4"
    )
    assert (example.target, example.answer) == ("the correct answer is ending2", "ending2")
    assert example.options == tuple(f"the correct answer is ending{i}" for i in (1, 2, 3, 4))
    sizes = [len(load("hellaswag", split, tmp_path)) for split in ("train", "validation")]
    assert sizes == [18, 2] and load("hellaswag", "train", tmp_path)[0].answer == "ending4"


UTTERANCES = ["Hi .", "Hello  you .", "Bye .", " Bye ."]
SHORT = {"summary": "Short."}


def summary(what, *texts):
    prompt = f"Summarize the following {what}."
    return Example(prompt, texts[0], "", "Long.", (), texts, document=True)


def reply(before, text):
    prompt = "Write the next reply of Speaker 2 in the following dialogue."
    return Example(prompt, text, "", before, (), (text,))


REPLIES = [
    reply("Speaker 1: Hi .", "Hello you ."),
    reply("Speaker 1: Hi .\nSpeaker 2: Hello you .\nSpeaker 1: Bye .", "Bye ."),
]


@pytest.mark.parametrize(
    ("file", "row", "wanted"),
    [
        (
            "cnn_dailymail/test.json",
            {"article": "Long.", "highlights": "Short. "},
            [summary("article", "Short.")],
        ),
        ("xsum/test.json", {"document": "Long."} | SHORT, [summary("article", "Short.")]),
        ("samsum/test.json", {"dialogue": "Long."} | SHORT, [summary("dialogue", "Short.")]),
        (
            "dialogsum/dialogsum.test.jsonl",
            {"dialogue": "Long."} | {f"summary{i}": f"{i}." for i in (1, 2, 3)},
            [summary("dialogue", "1.", "2.", "3.")],
        ),
        ("dailydialog/test.jsonl", {"dialog": UTTERANCES, "act": [1, 1, 1, 1]}, REPLIES),
        (
            "multiwoz/test.jsonl",
            {"turns": [{"speaker": "USER", "utterance": u} for u in UTTERANCES]},
            REPLIES,
        ),
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
    told = task.parse("request: phone; Price Range: cheap; area: east")
    assert task.score(told, examples[1].answer)


def test_mawps_equations_are_worked_solutions(tmp_path):
    rows = (MAWPS | {"original_text": f"{i} ? ", "ans": "2.0" if i else 2.0} for i in range(20))
    write(tmp_path / "mawps" / "trainset.json", *rows)
    found = {(e.target, e.answer) for e in load("mawps", "train", tmp_path)}
    assert found == {("X=(1.0+1.0)\nThe answer is 2.0.", "2.0")}


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


ROWS = {"llm_adapters": ADAPTERS, "gsm8k": GSM8K, "hellaswag": HELLASWAG, "summary": SUMMARY}
ROWS |= {"woz": WOZ, "dialogue": DIALOGUE, "mawps": MAWPS}
NO_TEXT, NO_SLOTS = (
    without(TURNS[1], "transcript"),
    TURNS[0] | {"belief_state": [{"act": "inform"}]},
)


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("llm_adapters", {"output": None}, r"no field 'output', the row has"),
        ("llm_adapters", {"answer": 4}, r"'answer' must be a string, got int"),
        ("llm_adapters", {"input": []}, r"'input' must be a string, got list"),
        ("llm_adapters", {"instruction": " "}, r"the instruction \(or question\) is empty"),
        (
            "llm_adapters",
            {"output": " ", "answer": ""},
            r"'output' is empty and there is no 'answer'",
        ),
        ("gsm8k", {"answer": "12"}, r"must end with '#### N', got '12'"),
        ("gsm8k", {"answer": None}, r"no field 'answer'.*Expected question, answer"),
        (
            "hellaswag",
            {"ctx": None},
            r"no field 'ctx'.*Expected activity_label, ctx, endings, label",
        ),
        ("hellaswag", {"endings": "a"}, r"'endings' must be a list, got str"),
        ("hellaswag", {"endings": ["a", 1]}, r"must be a list of strings"),
        ("hellaswag", {"label": 4}, r"label=4 is not the index of one of the 4 endings"),
        ("hellaswag", {"label": ""}, r"label='' is not"),
        ("summary", {"summary": None}, r"no field 'summary'"),
        ("summary", {"dialogue": None}, r"no field 'dialogue'.*Expected dialogue, article or"),
        ("summary", {"summary1": " "}, r"the text or a summary of it is empty"),
        ("summary", {"article": 3}, r"'article' must be a string, got int"),
        ("woz", {"dialogue_idx": None}, r"no field 'dialogue_idx'"),
        ("woz", {"dialogue": "a"}, r"field 'dialogue' must be a list"),
        ("woz", {"dialogue": ["a"]}, r"string indices must be.*Expected dialogue_idx and dialogue"),
        ("woz", {"dialogue": [TURNS[0], NO_TEXT]}, r"no field 'transcript'"),
        ("woz", {"dialogue": [NO_SLOTS]}, r"no field 'slots'.*belief_state, a list of \{act"),
        ("dialogue", {"dialog": None}, r"no field 'dialog'"),
        ("dialogue", {"turns": [{"speaker": "U"}]}, r"no field 'utterance'"),
        ("dialogue", {"dialog": ["a", 1]}, r"every turn must be a string"),
        ("mawps", {"ans": "one"}, r"'one'. Expected .* ans, a number"),
    ],
)
def test_malformed_rows_are_refused_with_their_place(tmp_path, format, changes, message):
    good = ROWS[format]
    bad = {key: value for key, value in (good | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=f"rows.jsonl, row 2: .*{message}"):
        read_file(write(tmp_path / "rows.jsonl", good, bad), format)


GOOD = json.dumps(ADAPTERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{GOOD}\n\n{{broken", r"data, row 3: invalid JSON at column 2"),
        (f"{GOOD}\n[1]", r"data, row 2: expected an object, got list"),
        (f"[{GOOD},", r"data: invalid JSON at column 111"),
        (f"[{GOOD},\n{{broken", r"data: invalid JSON at line 2, column 2"),
        (f"[{GOOD}, 3]", r"data, row 2: expected an object, got int"),
        (
            f'{GOOD}\n{{"answer": {"1" * 5000}}}',
            r"data, row 2: JSON that Python cannot read.*digit",
        ),
        ("[" * 100_000, r"data: JSON that Python cannot read"),
        ("[]", r"data: no rows"),
        (" \n", r"data: no rows"),
        (b"\xff\xfe", r"data: not UTF-8 text"),
    ],
)
def test_malformed_files_are_refused_with_their_row(tmp_path, text, message):
    path = tmp_path / "data"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        list(table_rows(path))
    with pytest.raises(ConfigError, match=r"no dialogue has a second turn"):
        read_file(write(tmp_path / "rows", {"dialog": ["a"]}), "dialogue")


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


# --- LLM-Adapters' wording ------------------------------------------------------------------------

_FORMAT = r"\n\nAnswer format: .*"
_ANSWERS = r".*?: (.*)\n\n" + r"Answer1: (.*) Answer2: (.*) Answer3: (.*?)(?: Answer4: (.*?))?"
PATTERNS = {
    "boolq": r".*?, question: (.*)\?" + _FORMAT,
    "piqa": r".*?: (.*)\n\nSolution1: (.*)\n\nSolution2: (.*)" + _FORMAT,
    "social_i_qa": _ANSWERS + _FORMAT,
    "hellaswag": r".*?: (.*?: .*)\n\nEnding1: (.*) Ending2: (.*) Ending3: (.*) Ending4: (.*)"
    + _FORMAT,
    "winogrande": r".*?: (.*)\n\nOption1: (.*) Option2: (.*) Answer format: .*",
    "ARC-Easy": _ANSWERS + r"(?: Answer5: (.*?))?" + _FORMAT,
}
PATTERNS |= dict.fromkeys(["ARC-Challenge", "openbookqa"], PATTERNS["ARC-Easy"])


@pytest.mark.parametrize("name", PATTERNS)
def test_the_wording_gives_llm_adapters_rows_byte_for_byte(name):
    """Every test row taken apart and put together again."""
    for row in read_file(real_data(f"llm_adapters/dataset/{name}/test.json"), "llm_adapters"):
        found = re.fullmatch(PATTERNS[name], row["prompt"], re.DOTALL)
        question, *texts = [part for part in found.groups() if part is not None]
        gold = 0 if name == "boolq" else int(row["answer"][-1]) - 1
        activity, _, context = question.partition(": ")
        one, two = (*texts, "", "")[:2]
        raw = {
            "boolq": {"question": question, "answer": row["answer"] == "true"},
            "piqa": {"goal": question, "sol1": one, "sol2": two},
            "hellaswag": {"activity_label": activity, "ctx": context, "endings": texts},
            "winogrande": {"sentence": question, "option1": one, "option2": two},
        }.get(name)
        made = FORMATS[name].read(raw | {"label": gold}) if raw else answers(question, texts, gold)
        assert made == [without(row, "input")] and not row["input"]


# --- public datasets ------------------------------------------------------------------------------

# Rows as TFDS decodes them from the features of its own builders.
ARC = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
STEM = {"stem": "S is"} | {f"choice_{letter}": letter.lower() for letter in "ABCD"}
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
        {"question": "Q?", "choices": ARC, "answerKey": "C", "id": "1"},
        "question: Q?\n\nAnswer1: x Answer2: y Answer3: z\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "openbookqa": (
        {"question": STEM, "answerKey": "B", "humanScore": 1.0, "clarity": 1.0}
        | {"fact1": "", "turkIdAnonymized": ""},
        "S is\n\nAnswer1: a Answer2: b Answer3: c Answer4: d\n\n",
        "answer2",
    ),
    "hellaswag": (
        {"activity_label": "Baking", "context": "he", "endings": ["a", "b", "c", "d"], "label": 3}
        | {"split_type": "", "source_id": ""},
        "sentence: Baking: he\n\nEnding1: a Ending2: b",
        "ending4",
    ),
    "winogrande": (
        {"sentence": "_ won.", "option1": "A", "option2": "B", "label": "2"},
        "_ won.\n\nOption1: A Option2: B Answer format",
        "option2",
    ),
    "gsm8k": (GSM8K | {"annotation": "", "short_answer": ""}, "How many?", "1012"),
}
TFDS_ROWS["arc_challenge"] = TFDS_ROWS["arc_easy"]


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(public, "_require_network", lambda *args: None)


@pytest.mark.parametrize("task", TFDS_ROWS)
def test_rows_of_tfds_become_llm_adapters_rows(task, no_download):
    row, prompt, answer = TFDS_ROWS[task]
    splits = public.PUBLIC[task].splits

    def as_data_source(builder, split, **_):
        """Rows encoded and decoded by the features of the real builder, as a prepared dataset gives
        them; the test rows are all `row`.
        """
        names = ("question", "goal", "context", "sentence")
        features, name = builder.info.features, next(key for key in names if key in row)

        def decoded(i):
            changed = row[name] | {"stem": f"{i}"} if isinstance(row[name], dict) else f"{i}"
            kept = row if split == splits["test"] else row | {name: changed}
            return features.deserialize_example_np(
                features.serialize_example(features.encode_example(kept))
            )

        assert split in splits.values()
        return [decoded(i) for i in range(30)]

    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        examples = load(task, "test")
        sizes = (len(load(task, "train")), len(load(task, "validation")))
    # Held out of train where the published rows are the test rows.
    assert sizes == ((30, 30) if "validation" in splits else (27, 3)) and len(examples) == 30
    assert prompt in examples[0].prompt and examples[0].answer == answer in examples[0].target
    assert task == "gsm8k" or examples[0].target in examples[0].options


def test_public_datasets_are_those_of_tasks():
    assert {*public.PUBLIC} < {*TASKS}
    # TFDS finds its own hellaswag, with ours imported above.
    module = importlib.import_module("tensorflow_datasets.text.hellaswag").__name__
    assert type(tfds.builder("hellaswag", try_gcs=False)).__module__ == module


def test_without_network_the_message_says_so(monkeypatch):
    import requests

    def head(*args, **kwargs):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", head)
    message = (
        r"'boolq': data.data_dir is not set, and the TFDS dataset 'bool_q' is not in \S+ and cannot"
        r" be downloaded: no connection to storage"
        r".*set data.data_dir \(--data-dir\) to the folder that holds boolq/.*LLM-Adapters"
    )
    with pytest.raises(ConfigError, match=message):
        load("boolq", "test")


def test_tfds_downloads_and_prepares_without_tensorflow(tmp_path, no_download, monkeypatch):
    """Through a web server of this test, in place of the published one."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    rows = [{"question": f"is {i} even", "passage": "", "title": ""} for i in range(20)]
    rows = [row | {"answer": i % 2 == 0} for i, row in enumerate(rows)]
    write(tmp_path / "web" / "train.jsonl", *rows)
    write(tmp_path / "web" / "dev.jsonl", *rows[:3])
    from tensorflow_datasets.datasets.bool_q import bool_q_dataset_builder as module

    handler = functools.partial(Quiet, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name, file in (("_TRAIN_DOWNLOAD_URL", "train"), ("_VALIDATION_DOWNLOAD_URL", "dev")):
            monkeypatch.setattr(module, name, f"http://127.0.0.1:{server.server_port}/{file}.jsonl")
        examples = load("boolq", "test")
        server.shutdown()
    found = sorted((e.prompt.split("question: ")[1][:9], e.answer) for e in examples)
    assert found == [("is 0 even", "true"), ("is 1 even", "false"), ("is 2 even", "true")]
    assert len(load("boolq", "train")) == 18  # prepared once, the server is gone
    assert "tensorflow" not in sys.modules


SIQA = {"context": "Al ran.", "question": "Why?", "label": "2"}
SIQA |= {f"answer{letter}": letter.lower() for letter in "ABC"}
HUB_ROWS = {
    "social_i_qa": (SIQA, "question: Al ran. Why?\n\nAnswer1: a Answer2: b Answer3: c\n\n", "er2"),
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


def test_errors_of_the_hub_are_explained(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline")

    broken = types.SimpleNamespace(load_dataset=load_dataset)
    modules = {
        "ConnectionError: offline": broken,
        "ModuleNotFoundError.*pip install datasets": None,
    }
    for message, module in modules.items():  # None: as if it were not installed
        monkeypatch.setitem(sys.modules, "datasets", module)
        message = (
            r"'xsum': data.data_dir is not set, and .* cannot be read from the .* hub: " + message
        )
        with pytest.raises(ConfigError, match=message):
            load("xsum", "test")
