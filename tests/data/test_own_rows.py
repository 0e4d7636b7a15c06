"""The user's own rows: in files of any type, in folders, on the hub and in TFDS."""

from __future__ import annotations

import csv
import json

import pytest
from support.chat import LONG, SHORT, WITH_SYSTEM, turn
from support.tasks import load, write

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data.builders.own import read_own
from zflora_jax.data.builders.public import Hub, Named, Tfds, named_dataset
from zflora_jax.data.mixture import load_mixture

CHATS = [{"messages": LONG}, {"messages": SHORT}]
CALL = [SHORT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]


def as_csv(path, *rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(path, *rows):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def as_json(path, *rows):
    return write(path, list(rows))


def turns_of(examples):
    return [list(example.turns) for example in examples]


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "save"), [("json", as_json), ("jsonl", write), ("parquet", as_parquet)]
)
def test_conversations_of_any_file(suffix, save, tmp_path):
    """Also where every turn has the columns of all, as Parquet's have."""
    rows = [*CHATS, {"messages": [*CALL, {"role": "tool", "content": "4"}, SHORT[1]]}]
    save(tmp_path / f"test.{suffix}", *rows)
    examples = load("rows", "test", tmp_path)
    want = [LONG, SHORT, [CALL[0], {**CALL[1], "content": ""}, *rows[2]["messages"][2:]]]
    assert turns_of(examples) == want
    assert [e.form for e in examples] == ["messages"] * 3
    assert (examples[0].prompt, examples[0].target) == (LONG[2]["content"], LONG[3]["content"])


def test_csv(tmp_path):
    """Texts with commas, quotes and line breaks, and conversations as JSON."""
    as_csv(tmp_path / "test.csv", {"prompt": 'a, "b"\nc', "completion": " d"})
    (example,) = load("rows", "test", tmp_path)
    assert (example.prompt, example.target, example.plain) == ('a, "b"\nc', " d", True)
    as_csv(tmp_path / "test.csv", *({"messages": json.dumps(x["messages"])} for x in CHATS))
    assert turns_of(load("rows", "test", tmp_path)) == [LONG, SHORT]


def not_unicode(path):
    import pyarrow.parquet

    texts = pyarrow.array([b"good", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "text,more\na,b,c\n",
            r"a.csv, row 1: not as many cells as the header has columns",
        ),
        ("a.csv", "prompt,text,text\na,b,c\n", r"a.csv: two columns are called 'text'"),
        ("a.csv", "text\n", r"a.csv: no rows"),
        ("a.csv", "prompt,completion\na,b\nc,\n", r"row 2: no field 'completion'.*an empty cell"),
        ("a.parquet", "no", r"a.parquet: invalid Parquet"),
        ("a.parquet", not_unicode, r"a.parquet: invalid Parquet: .*can't decode"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}', r"row 2: target is no JSON in Unicode"),
    ],
)
def test_malformed_files(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content) if isinstance(content, str) else content(path)
    with pytest.raises(ConfigError, match=message):
        load("rows", "train", path)


def test_nulls_are_nothing(tmp_path):
    """As Arrow and CSV files have them in every column that another row fills."""
    rows = [{"instruction": "a", "input": None, "output": "b"}]
    rows += [{"instruction": "a", "input": "c", "output": "d"}]
    path = as_parquet(tmp_path / "a.parquet", *rows)
    assert {e.input for e in load("rows", "train", path)} == {"", "c"}
    path = as_csv(tmp_path / "test.csv", {"messages": "", "text": "Once."})
    assert load("rows", "train", path)[0].form == "text"
    calls = [[{"function": {"name": "f", "arguments": {x: 1}}}] for x in ("a", "b")]
    turns = [[SHORT[0], {"role": "assistant", "content": "", "tool_calls": c}] for c in calls]
    (tmp_path / "test.csv").unlink()
    as_parquet(tmp_path / "test.parquet", *({"messages": t} for t in turns))
    (tmp_path / "a.parquet").unlink()
    assert [e.turns[1]["tool_calls"] for e in load("rows", "test", tmp_path)] == calls


# --- folders --------------------------------------------------------------------------------------


def test_parts_of_splits_in_a_folder(tmp_path):
    """As the hub lays them out; a file that is of no split is not left out in silence."""
    write(tmp_path / "my-train.jsonl", {"text": "Once."})
    with pytest.raises(ConfigError, match=r"no train, validation or test file.*Files may be .json"):
        load("rows", "train", tmp_path)
    (tmp_path / "my-train.jsonl").unlink()
    (tmp_path / "notes.txt").write_text("not rows")
    for name, rows in (("train-00000-of-00002", 3), ("train-00001-of-00002", 4), ("test-1", 2)):
        write(tmp_path / f"{name}.jsonl", *({"text": f"{name} {i}"} for i in range(rows)))
    train, test = (load("rows", split, tmp_path) for split in ("train", "test"))
    assert len(train) == 7 and [e.target for e in test] == ["test-1 0", "test-1 1"]
    assert test[0].where.endswith("test-1.jsonl, row 1")
    write(tmp_path / "more.jsonl", {"text": "Once."})
    with pytest.raises(ConfigError, match=r"which are splits, and more.jsonl, which are of none"):
        load("rows", "train", tmp_path)
    (tmp_path / "more.jsonl").rename(tmp_path / "train.jsonl")
    with pytest.raises(ConfigError, match=r"and train-00000-of-00002.jsonl, train-00001-of-00002"):
        load("rows", "train", tmp_path)


def test_dialogues_that_begin_alike_stay_together(tmp_path):
    """Each in two lengths; the system's turn is a part of how they begin."""
    rows = [
        {"messages": [{"role": "system", "content": f"{i}"}, *LONG[: 2 * n]]}
        for i in range(40)
        for n in (1, 2)
    ]
    write(tmp_path / "train.jsonl", *rows)
    train, test = (load("rows", split, tmp_path) for split in ("train", "test"))
    begin = [{e.turns[0]["content"] for e in part} for part in (train, test)]
    assert begin[1] and begin[0].isdisjoint(begin[1])
    write(tmp_path / "train.jsonl", *[{"messages": SHORT}] * 40)
    with pytest.raises(ConfigError, match=r"begin alike.*Put validation.json\(l\) and test"):
        load("rows", "train", tmp_path)


@pytest.mark.parametrize("usual", [60, 85])
@pytest.mark.parametrize("opening", ["hi", "Who are you?", "Write a poem", "What can you do?"])
def test_a_usual_opening_stays_in_train(opening, usual, tmp_path):
    """Wherever it lies in the order by hashes: here before, at and behind the cuts."""
    rows = [{"messages": [turn("user", opening), turn("assistant", f"{i}")]} for i in range(usual)]
    rows += [{"messages": [turn("user", f"{i}?"), SHORT[1]]} for i in range(100 - usual)]
    write(tmp_path / "train.jsonl", *rows)
    parts = [load("rows", split, tmp_path) for split in ("train", "validation", "test")]
    held_out = min(10, (100 - usual) // 2)
    assert [len(part) for part in parts] == [100 - 2 * held_out, held_out, held_out]
    assert [sum(e.turns[0]["content"] == opening for e in part) for part in parts] == [usual, 0, 0]


# --- forms ----------------------------------------------------------------------------------------


def test_sharegpt(tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[t["role"]], "value": t["content"]} for t in LONG]
    turns.insert(2, {"from": "observation", "value": "4"})
    path = write(tmp_path / "a.jsonl", {"conversations": turns, "system": "Be short."})
    (example,) = load("rows", "train", path)
    roles = [turn["role"] for turn in example.turns]
    assert roles == ["system", "user", "assistant", "tool", "user", "assistant"]
    assert example.turns[-1] == LONG[-1] and example.turns[0]["content"] == "Be short."


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    row = {"messages": [{"role": "user", "content": parts}, SHORT[1]]}
    assert turns_of(load("rows", "train", write(tmp_path / "a.jsonl", row))) == [SHORT]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ('{"name": "Ada"}', '[{"x": 1}]'),
        ('{"from": "Ada"}', '[{"from": "Bob"}]'),
        ("[]", "[]"),
        ("[3, 1]", "[1, 3]"),
        ("[" * 100_000, f"[{'1' * 5000}]"),
    ],
    ids=["object", "from", "empty", "list", "beyond-python"],
)
def test_json_that_is_no_turn_is_a_text(tmp_path, prompt, completion):
    """Extraction from JSON to JSON, as JSON lines and as CSV."""
    row = {"prompt": prompt, "completion": completion}
    for path in (write(tmp_path / "a.jsonl", row), as_csv(tmp_path / "b.csv", row)):
        (example,) = load("rows", "train", path)
        assert (example.prompt, example.target) == (prompt, completion)


def test_an_answer_format_of_own_rows_need_not_list_options(tmp_path):
    rows = [
        {"instruction": "When? Answer format: DD/MM/YYYY", "output": "01/02/2020"},
        {"instruction": "Is it? Answer format: yes/no", "output": "Yes.", "answer": "yes"},
        {"instruction": "Is it? Answer format: yes/no", "output": "It is yes.", "answer": "yes"},
    ]
    rows[0]["answer"] = rows[0]["output"]
    found = load("rows", "train", write(tmp_path / "a.jsonl", *rows))
    options = {example.target: example.options for example in found}
    assert options == {"01/02/2020": (), "Yes.": (), "It is yes.": ("It is yes.", "It is no.")}


@pytest.mark.parametrize("answer", [{}, {"answer": "A"}])
def test_the_output_of_own_rows_is_learned_as_it_stands(answer):
    """LLM-Adapters' marker "A:" is a label of the options here, and spaces may be code's."""
    for output in ("A: Paris", "    return x\n"):
        row = {"instruction": "Which? A: Paris B: Rome", "output": output}
        [found] = read_own([("row 1", row | answer)])
        assert found["target"] == output


INSTRUCTION, QUESTION = {"instruction": "a", "output": "b"}, {"question": "a", "answer": "#### 1"}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (INSTRUCTION | {"input": "", "prompt": "### a"}, "instruction"),
        (QUESTION | {"prompt": "### a"}, "question"),
        ({"prompt": "### a", "text": "### a b"}, "text"),
        (INSTRUCTION | {"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"instruction": "a", "answer": "b", "output": ""}, "instruction"),
        (QUESTION | {"instruction": "Solve"}, "question"),
        ({"text": "Once.", "messages": SHORT}, "messages"),
    ],
)
def test_a_form_is_recognised_by_all_that_it_needs(row, form):
    """As rendered prompts stand next to what they were made of."""
    [found] = read_own([("row 1", row)])
    assert found["form"] == form


def test_a_form_that_is_named(tmp_path):
    """The form of the first row is that of all."""
    row = {"text": "Once.", "messages": SHORT}
    path = write(tmp_path / "a.jsonl", row, row)
    assert [e.target for e in load("rows", "train", path, row_format="text")] == ["Once."] * 2
    both = {"instruction": "a", "output": "b", "question": "c", "answer": "d #### 1"}
    asked = load("rows", "train", write(tmp_path / "b.jsonl", both), row_format="question")
    assert (asked[0].prompt, asked[0].answer) == ("c", "1")
    with pytest.raises(ConfigError, match=r"data.row_format='txt': did you mean 'text'"):
        DataConfig(row_format="txt")
    with pytest.raises(ConfigError, match=r"data.row_format='text' is for rows of your own"):
        load_mixture(DataConfig("gsm8k", data_dir=str(tmp_path), row_format="text"), "train")
    write(tmp_path / "a.jsonl", {"messages": SHORT}, {"text": "Once."})
    with pytest.raises(ConfigError, match=r"row 2: nothing in column 'messages', by which rows"):
        load("rows", "train", path)


def test_a_form_is_for_the_own_rows_of_a_mixture(tmp_path):
    write(tmp_path / "train.jsonl", *({"text": f"{i}", "messages": SHORT} for i in range(30)))
    questions = [{"question": f"{i}?", "answer": f"{i} #### {i}"} for i in range(30)]
    write(tmp_path / "gsm8k" / "train.jsonl", *questions)
    data = DataConfig("rows+gsm8k", data_dir=str(tmp_path), row_format="text")
    assert {example.form for example in load_mixture(data, "train")} == {"text", ""}
    assert load("gsm8k", "test", tmp_path, row_format="text")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"row 1: 'messages' is empty.*Remove the row"),
        ({"messages": "Hi"}, r"'messages' must be a list of turns.*got str 'Hi'"),
        ({"messages": [turn("user", "Hi")]}, r"'messages' has no turn of the assistant"),
        ({"messages": [{"content": "Hi"}]}, r"turn 1 has no role: expected 'role' \(or 'from'\)"),
        ({"messages": [turn("user", "Hi"), {"role": "assistant"}]}, r"turn 2 has no text"),
        ({"messages": [turn("usr", "Hi")]}, r"turn 1: unknown role 'usr': did you mean 'user'\?"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"turn 1 has content of type 'image_url'; the models here read text alone",
        ),
        ({"prompt": "a", "completion": " "}, r"the text to learn is empty"),
        ({"prompt": "a"}, r"no field 'completion'"),
        ({"prompt": SHORT[:1], "completion": "Hi!"}, r"'completion' must be a list of turns"),
        ({"prompt": "a", "completion": SHORT[1:]}, r"field 'completion' must be a string"),
        ({"messages": [SHORT[0], turn("assistant", " ")]}, r"turn 2 is an empty answer"),
        ({"messages": [SHORT[0], {**SHORT[1], "weight": 0}]}, r"turn 2 has a weight other than 1"),
        ({"messages": SHORT, "tools": "none"}, r"'tools' must be a list of JSON schemas"),
        ({"messages": SHORT, "chat_template_kwargs": 3}, r"'chat_template_kwargs' must be an obj"),
        ({"messages": SHORT, "chat_template_kwargs": "[" * 100_000}, r"must be an object, got"),
        ({"messages": SHORT, "system": 3}, r"a system column must be text; got 3"),
        ({"prompt": "a", "completion": "b", "system": "c"}, r"would leave out 'system'\. Put it"),
        (INSTRUCTION | {"history": [["c", "d"]]}, r"would leave out 'history'"),
        (QUESTION | {"context": "c"}, r"would leave out 'con"),
        (
            {"messages": WITH_SYSTEM, "system_prompt": "Be long."},
            r"a system turn and another text in a column",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            r"'function_call' is not read: give the call as a turn of the assistant",
        ),
        ({"instruction": "x", "output": " "}, r"'output' is empty and there is no 'answer'"),
        ({"chosen": "a", "rejected": "b"}, r"'chosen', 'rejected' are of no form that is known"),
    ],
)
def test_malformed_rows(row, message):
    with pytest.raises(ConfigError, match=f"a.jsonl, row 1.*{message.removeprefix('row 1: ')}"):
        list(read_own([("a.jsonl, row 1", row)]))


# --- named datasets -------------------------------------------------------------------------------


def test_names():
    assert named_dataset("hub:a/b") == Named(Hub("a/b"), "{}", "hub:a/b")
    assert named_dataset("hub:a/b:c@{}_sft") == Named(Hub("a/b", "c"), "{}_sft", "hub:a/b:c")
    assert named_dataset("tfds:glue:cola") == Named(Tfds("glue/cola"), "{}", "tfds:glue:cola")
    for wrong in ("hub:", "hub:a/b@sft", "tfds:"):
        with pytest.raises(ConfigError, match=r"names no dataset. Expected hub:OWNER/NAME"):
            named_dataset(wrong)


@pytest.mark.filterwarnings("ignore")  # of datasets' own
def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    """A folder, which `datasets` opens as it opens one of the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "named"
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, SHORT[1]]} for i in range(40)]
    write(folder / "train.jsonl", *rows)
    write(folder / "test.jsonl", *CHATS)
    name = f"hub:{folder}"
    assert turns_of(load("rows", "test", name)) == [LONG, SHORT]
    train, held_out = (load("rows", split, name) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (36, 4)
    assert {e.prompt for e in train}.isdisjoint(e.prompt for e in held_out)
    with pytest.raises(ConfigError, match=r"the splits train, test: none is 'train_sft'.*@{}_sft"):
        load("rows", "train", f"{name}@{{}}_sft")
    with pytest.raises(ConfigError, match=r"'.*nowhere' cannot be read from the Hugging Face hub"):
        load("rows", "train", f"{name}/nowhere")
    (folder / "train.jsonl").unlink()
    assert turns_of(load("rows", "test", name)) == [LONG, SHORT]


def test_a_dataset_of_tfds(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Stories(tfds.core.GeneratorBasedBuilder):  # type: ignore[call-arg]
        """Texts for this test."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._rows("a", 30), "test": self._rows("b", 2)}

        def _generate_examples(self):
            raise NotImplementedError

        def _rows(self, name, count):
            yield from ((i, {"text": f"{name} {i}"}) for i in range(count))

    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path))
    assert sorted(e.target for e in load("rows", "test", "tfds:stories")) == ["b 0", "b 1"]
    assert len(load("rows", "train", "tfds:stories")) == 27
    with pytest.raises(ConfigError, match=r"TFDS dataset 'storys' cannot be prepared"):
        load("rows", "train", "tfds:storys")
