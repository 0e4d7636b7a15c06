"""Tasks read public datasets by name: rows of TFDS and of the Hugging Face hub become prompts and
answers, and errors say what to do.
"""

import importlib.util
import sys
import types

import pytest
import tensorflow_datasets as tfds
from support.tasks import load, write

from zflora_jax.core.fields import ConfigError
from zflora_jax.data.builders import public
from zflora_jax.data.task import FileTask
from zflora_jax.data.tasks import TASKS

pytestmark = pytest.mark.usefixtures("own_data_cache")

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
    files = [task for task in TASKS.values() if isinstance(task, FileTask)]
    assert {task.dataset for task in files if task.source.public} == set(public.PUBLIC)


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
