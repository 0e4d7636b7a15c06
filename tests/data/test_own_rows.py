"""The user's own rows: in files of any type, in folders, on the hub and in TFDS."""

from __future__ import annotations

import csv
import json

import pytest
from support.chat import LONG, SHORT, WITH_SYSTEM, turn
from support.tasks import load, write

from zflora_jax import ConfigError, DataConfig
from zflora_jax.data.builders.own import read_rows
from zflora_jax.data.builders.public import Dataset, Hub, Tfds, named_dataset
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.tasks import TASKS

CHATS = [{"messages": LONG}, {"messages": SHORT}]
CALL = [SHORT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]


def as_csv(path, *rows):
    """Conversations as JSON."""
    cells = [{k: x if isinstance(x, str) else json.dumps(x) for k, x in r.items()} for r in rows]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(cells)
    return path


def as_parquet(path, *rows):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def turns_of(examples):
    return [list(example.turns) for example in examples]


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "save"),
    [
        ("json", lambda path, *rows: write(path, list(rows))),
        *(("jsonl", write), ("parquet", as_parquet), ("csv", as_csv)),
    ],
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


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [('a, "b"\nc', " d"), ('{"name": "Ada"}', '[{"x": 1}]'), ("[3, 1]", "[]"), ("[" * 10**5, "[1")],
    ids=["quoted", "object", "list", "beyond-python"],
)
def test_texts_are_taken_as_they_are(tmp_path, prompt, completion):
    """Of JSON lines and CSV, also JSON that is no turn."""
    row = {"prompt": prompt, "completion": completion}
    for path in (write(tmp_path / "a.jsonl", row), as_csv(tmp_path / "b.csv", row)):
        (example,) = load("rows", "train", path)
        assert (example.prompt, example.target, example.plain) == (prompt, completion, True)
    path = as_csv(tmp_path / "c.csv", {"prompt": LONG[:3], "completion": LONG[3:]})
    assert turns_of(load("rows", "train", path)) == [LONG]


ONCE = '{"text": "Once."}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,more\na,b,c\n", r"a.csv, row 1: not as many cells as the header has"),
        ("a.csv", "prompt,text,text\na,b,c\n", r"a.csv: two columns are called 'text'"),
        ("a.csv", "text\n", r"a.csv: no rows"),
        ("a.csv", "prompt,completion\na,b\nc,\n", r"row 2: no field 'completion'.*an empty cell"),
        ("a.parquet", "no", r"a.parquet: invalid Parquet"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}', r"row 2: .*surrogates not allowed"),
        ("a.jsonl", f"{ONCE}\n\n{{broken", r"row 3: JSON that cannot be read: .* column 2"),
        ("a.json", f"[{ONCE},\n{{broken", r"a.json: JSON that cannot be read: .* line 2 column 2"),
        ("a.jsonl", f"{ONCE}\n[1]", r"row 2: expected an object, got list"),
        ("a.json", f"[{ONCE}, 3]", r"row 2: expected an object, got int"),
        ("a.jsonl", f'{ONCE}\n{{"text": {"1" * 5000}}}', r"row 2: JSON that cannot be .*digit"),
        ("a.json", "[" * 100_000, r"a.json: JSON that cannot be read: .*recursion"),
        ("a.json", "[]", r"a.json: no rows"),
        ("a.jsonl", "\n\n", r"a.jsonl: no rows"),
        ("a.json", b"\xff\xfe", r"a.json: not UTF-8 text"),
    ],
)
def test_malformed_files(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        load("rows", "train", path)


def test_nulls_are_nothing(tmp_path):
    """As Arrow and CSV files have them in every column that another row fills."""
    rows = [{"instruction": "a", "input": x, "output": "b"} for x in (None, "c")]
    path = as_parquet(tmp_path / "a.parquet", *rows)
    assert {e.input for e in load("rows", "train", path)} == {"", "c"}
    path = as_csv(tmp_path / "b.csv", {"messages": "", "text": "Once."})
    assert load("rows", "train", path)[0].form == "text"
    calls = [[{"function": {"name": "f", "arguments": {x: 1}}}] for x in ("a", "b")]
    turns = [[SHORT[0], {"role": "assistant", "content": "", "tool_calls": c}] for c in calls]
    path = as_parquet(tmp_path / "c.parquet", *({"messages": t} for t in turns))
    found = [e.turns[1]["tool_calls"] for e in load("rows", "train", path)]
    assert sorted(found, key=str) == calls


# --- folders --------------------------------------------------------------------------------------


def test_parts_of_splits_in_a_folder(tmp_path):
    """As the hub lays them out; a file that is of no split is not left out in silence."""

    def refused(message):
        with pytest.raises(ConfigError, match=message):
            load("rows", "train", tmp_path)

    other = write(tmp_path / "my-train.jsonl", {"text": "Once."})
    refused(r"no train, validation or test file.*Files may be .json")
    other.unlink()
    (tmp_path / "notes.txt").write_text("not rows")
    for name, rows in (("train-00000-of-00002", 3), ("train-00001-of-00002", 4), ("test-1", 2)):
        write(tmp_path / f"{name}.jsonl", *({"text": f"{name} {i}"} for i in range(rows)))
    train, test = (load("rows", split, tmp_path) for split in ("train", "test"))
    assert len(train) == 7 and [e.target for e in test] == ["test-1 0", "test-1 1"]
    assert test[0].where.endswith("test-1.jsonl, row 1")
    for name, message in (
        ("more.jsonl", r"which are splits, and more.jsonl, which belong to no readable"),
        ("train-2024-eval.jsonl", r"splits, and train-2024-eval.jsonl, which belong to no"),
        ("validation.jsonl.gz", r"splits, and validation.jsonl.gz, which belong to no readable"),
        ("train.jsonl", r"00001-of-00002.jsonl and train.jsonl for one split"),
        ("train-00002-of-00003.jsonl", r"not all parts of one split, each once\. Add"),
        ("train-00000-of-00002.csv", r"not all parts of one split, each once: see 0\. Add"),
        ("train-00003-of-00002.jsonl", r"each once: see 3\. Add"),
        ("test-01.jsonl", r"test-01.jsonl, test-1.jsonl, which are not .*: see 1\. Add"),
    ):
        other = write(tmp_path / name, {"text": "Once."})
        refused(message)
        other.unlink()
    write(tmp_path / "train-00000-of-00002.jsonl.gz", {"text": "Once."})  # what was unpacked
    assert len(load("rows", "train", tmp_path)) == 7
    (tmp_path / "train-00001-of-00002.jsonl").unlink()
    refused(r"has train-00000-of-00002.jsonl, which are not all parts of one split.*: see 1\. Add")


def test_dialogues_that_begin_alike_stay_together(tmp_path):
    """Each in two lengths; the system's turn is a part of how they begin."""
    turns = [([turn("system", f"{i}")], n) for i in range(40) for n in (1, 2)]
    write(tmp_path / "train.jsonl", *({"messages": x + LONG[: 2 * n]} for x, n in turns))
    train, test = (load("rows", split, tmp_path) for split in ("train", "test"))
    begin = [{e.turns[0]["content"] for e in part} for part in (train, test)]
    assert begin[1] and begin[0].isdisjoint(begin[1])
    write(tmp_path / "train.jsonl", *[{"messages": SHORT}] * 40)
    with pytest.raises(ConfigError, match=r"the same beginning.*Put validation.json\(l\) and test"):
        load("rows", "train", tmp_path)
    # With a usual opening more rows begin than a split should have: they stay in train.
    rows = [{"messages": [turn("user", "hi"), turn("assistant", f"{i}")]} for i in range(85)]
    rows += [{"messages": [turn("user", f"{i}?"), SHORT[1]]} for i in range(15)]
    write(tmp_path / "train.jsonl", *rows)
    parts = [load("rows", split, tmp_path) for split in ("train", "validation", "test")]
    asked = [[e.turns[0]["content"] == "hi" for e in part] for part in parts]
    assert [(len(part), sum(part)) for part in asked] == [(86, 85), (7, 0), (7, 0)]


# --- forms ----------------------------------------------------------------------------------------


def test_sharegpt_and_parts_of_text():
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[t["role"]], "value": t["content"]} for t in LONG]
    turns.insert(2, {"from": "observation", "value": "4"})
    row = {"conversations": turns, "system": "Be short."}
    [found] = read_rows([("", row)])
    tool = turn("tool", "4")
    assert found["turns"] == [turn("system", "Be short."), *LONG[:2], tool, *LONG[2:]]
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    rows = [{"messages": [{"role": "user", "content": parts}, SHORT[1]]}]
    rows += [{"messages": {name: [turn[name] for turn in SHORT] for name in SHORT[0]}}]  # of TFDS
    assert [found["turns"] for found in read_rows([("", row) for row in rows])] == [SHORT] * 2


def test_what_own_rows_say_is_taken_as_it_stands():
    """LLM-Adapters' marker "A:" is a label of the options here, spaces may be code's, and an answer
    format need not list options.
    """
    form, task = "Is it? Answer format: ", TASKS["rows"]
    for asked, output, answer, options in (
        ("Which? A: Paris B: Rome", "A: Paris", "A", ()),
        ("Which?", "    return x\n", "", ()),
        (f"{form}DD/MM/YYYY", "01/02", "01/02", ()),
        (f"{form}yes/no", "Yes.", "yes", ()),
    ):
        row = {"instruction": asked, "output": output} | ({"answer": answer} if answer else {})
        [found] = map(task.example, read_rows([("", row)]))
        assert (found.target, found.answer, found.options) == (output, answer, options)
    for output, listed, answer in (  # the answer is a whole word or number, the one that is stated
        ("{}, it is not known", "yes/no", "no"),
        ("{}. Because it's A.B", "A/B/C", "B"),
        ("12 - 10 = 2. The answer is {}, as 1 < 2.", "1/2/12", "2"),
        ("2.5 or 2/5 or -2 or 2-fold? {}!", "2/5", "2"),
        ("It is not 2 but 4: \\boxed{{{}}}", "2/4", "4"),
        ("3{}4", "</>", "<"),
        ("A dog barks, so {}.", "A/B", "A"),
        ("答案是{}。", "A/B", "B"),
    ):
        row = {"instruction": form + listed, "output": output.format(answer), "answer": answer}
        [found] = map(task.example, read_rows([("", row)]))
        assert found.options == tuple(map(output.format, listed.split("/")))
    for answer in ("Paris", "#### A\nb", "Use <<this>>.\n#### Paris, France", "#### 4\n"):
        [found] = map(task.example, read_rows([("", {"question": "a", "answer": answer})]))
        wanted = ("The answer is 4.", "4") if "4" in answer else (answer, answer)
        assert (found.target, found.answer) == wanted


INSTRUCTION, QUESTION = {"instruction": "a", "output": "b"}, {"question": "a", "answer": "#### 1"}


def test_a_form_is_recognised_by_all_that_it_needs():
    """As rendered prompts stand next to what they were made of."""
    for row, form in (
        (INSTRUCTION | {"input": "", "prompt": "### a"}, "instruction"),
        (QUESTION | {"prompt": "### a"}, "question"),
        ({"prompt": "### a", "text": "### a b"}, "text"),
        (INSTRUCTION | {"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"instruction": "a", "answer": "b", "output": ""}, "instruction"),
        (QUESTION | {"instruction": "Solve"}, "question"),
        ({"text": "Once.", "messages": SHORT}, "messages"),
    ):
        assert [found["form"] for found in read_rows([("row 1", row)])] == [form]


def test_a_form_that_is_named(tmp_path):
    """The form of the first row is that of all, and of no other task of a mixture."""
    path = write(
        tmp_path / "train.jsonl", *({"text": f"{i}", "messages": SHORT} for i in range(30))
    )
    questions = [{"question": f"{i}?", "answer": f"{i} #### {i}"} for i in range(30)]
    write(tmp_path / "gsm8k" / "train.jsonl", *questions)
    data = DataConfig("rows+gsm8k", data_dir=str(tmp_path), row_format="text")
    mixture = load_mixture(data, "train")
    assert {example.form for example in mixture} == {"text", ""} and mixture[0].target.isdigit()
    with pytest.raises(ConfigError, match=r"data.row_format='txt': did you mean 'text'"):
        DataConfig(row_format="txt")
    with pytest.raises(ConfigError, match=r"data.row_format='text' is for your rows"):
        load_mixture(DataConfig("gsm8k", data_dir=str(tmp_path), row_format="text"), "train")
    write(path, {"messages": SHORT}, {"text": "Once."})
    with pytest.raises(ConfigError, match=r"row 2: no field 'messages', the row has 'text'"):
        load("rows", "train", path)


# --- what is refused ------------------------------------------------------------------------------

IMAGE = [{"role": "user", "content": [{"type": "image_url"}]}]
FUNCTION_CALL = [{"from": "function_call", "value": "f()"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, r"'messages' is empty.*Remove the row"),
        ({"messages": "Hi"}, r"'messages' must be a list of turns.*got str 'Hi'"),
        ({"messages": {"role": ["user"] * 4, "content": ["a"] * 3}}, r"lengths: role 4, content 3"),
        ({"messages": [turn("user", "Hi")]}, r"no turn of the assistant"),
        ({"messages": [{"content": "Hi"}]}, r"turn 1 has no role: expected 'role' \(or 'from'\)"),
        ({"messages": [turn("user", "Hi"), {"role": "assistant"}]}, r"turn 2 has no text"),
        ({"messages": [turn("usr", "Hi")]}, r"turn 1: unknown role 'usr': did you mean 'user'\?"),
        ({"messages": IMAGE}, r"turn 1: .*image_url.* is no text, and models here read"),
        ({"prompt": "a", "completion": " "}, r"the text to learn is empty"),
        ({"prompt": "a"}, r"no field 'completion'"),
        ({"prompt": SHORT[:1], "completion": "Hi!"}, r"'completion' must be a list of turns"),
        ({"prompt": "a", "completion": SHORT[1:]}, r"field 'completion' must be a string"),
        ({"messages": [SHORT[0], turn("assistant", " ")]}, r"turn 2 is an empty answer"),
        ({"messages": [SHORT[0], {**SHORT[1], "weight": 0}]}, r"turn 2 has a weight other than 1"),
        ({"messages": SHORT, "tools": "none"}, r"'tools' must be a list of JSON schemas"),
        ({"messages": SHORT, "chat_template_kwargs": 3}, r"'chat_template_kwargs' must be an obj"),
        ({"messages": SHORT, "system": 3}, r"a system column must be text; got 3"),
        ({"prompt": "a", "completion": "b", "system": "c"}, r"would leave out 'system'\. Put it"),
        (INSTRUCTION | {"history": [["c", "d"]]}, r"would leave out 'history'"),
        (QUESTION | {"context": "c"}, r"would leave out 'con"),
        ({"messages": WITH_SYSTEM, "system_prompt": "Long."}, r"a system turn and another text"),
        ({"conversations": FUNCTION_CALL}, r"unknown role 'function_call'.*'tool_calls' of the"),
        ({"instruction": "x", "output": " "}, r"'output' is empty and there is no 'answer'"),
        ({"question": "x", "answer": " "}, r"'answer' is empty, so there is nothing to learn"),
        ({"better": "a", "worse": "b"}, r"'better', 'worse' fit no known form"),
    ],
)
def test_malformed_rows(row, message):
    with pytest.raises(ConfigError, match=f"a.jsonl, row 1.*{message}"):
        list(read_rows([("a.jsonl, row 1", row)]))


# --- named datasets -------------------------------------------------------------------------------


def test_names(monkeypatch):
    for source in (Hub, Tfds):
        monkeypatch.setattr(source, "splits", lambda self: ["train", "dev", "train_sft"])
    found = named_dataset("hub:a/b:c@{}_sft", "text")
    assert found == Dataset(Hub("a/b", "c"), "text", {"train": "train_sft"})
    usual = {"train": "train", "validation": "dev"}
    assert named_dataset("tfds:glue:cola") == Dataset(Tfds("glue/cola"), "", usual)
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
    rows = [{"messages": [turn("user", f"{i}"), SHORT[1]]} for i in range(40)]
    write(folder / "train.jsonl", *rows)
    write(folder / "test.jsonl", *CHATS)
    name = f"hub:{folder}"
    assert turns_of(load("rows", "test", name)) == [LONG, SHORT]
    train, held_out = (load("rows", split, name) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (36, 4)
    assert {e.prompt for e in train}.isdisjoint(e.prompt for e in held_out)
    for wrong, message in (
        ("@{}_sft", r"the splits train, test: none is 'train_sft'.*@{}_sft"),
        ("/nowhere", r"'.*nowhere' cannot be read from the Hugging Face hub"),
    ):
        with pytest.raises(ConfigError, match=message):
            load("rows", "train", name + wrong)


def test_a_dataset_of_tfds(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    class Stories(tfds.core.GeneratorBasedBuilder):  # type: ignore[call-arg]
        """Texts for this test."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples(30), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            yield from ((i, {"text": f"{count} {i}"}) for i in range(count))

    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path))
    assert sorted(e.target for e in load("rows", "test", "tfds:stories")) == ["2 0", "2 1"]
    assert len(load("rows", "train", "tfds:stories")) == 27
    with pytest.raises(ConfigError, match=r"TFDS dataset 'storys' cannot be prepared"):
        load("rows", "train", "tfds:storys")
