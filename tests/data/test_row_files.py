"""Rows of one's own in any file that holds tables, in a folder of them, on the hub and in TFDS."""

from __future__ import annotations

import contextlib
import csv
import json

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.chat import LONG, SHORT, turn
from support.tasks import load, write

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data import tokenization
from zflora_jax.data.builders.named import NamedDataset, named_dataset
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.tasks import get_task, load_examples
from zflora_jax.data.tokenization import Share, tokenize_examples

CHATS = [{"messages": LONG}, {"messages": SHORT}]


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


@pytest.mark.parametrize(
    ("suffix", "save"), [("json", as_json), ("jsonl", write), ("parquet", as_parquet)]
)
def test_conversations_of_any_file(suffix, save, tmp_path):
    """Also where every turn has the columns of all, as Parquet's have."""
    call = [SHORT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    rows = [*CHATS, {"messages": [*call, {"role": "tool", "content": "4"}, SHORT[1]]}]
    save(tmp_path / f"test.{suffix}", *rows)
    examples = load("rows", "test", tmp_path)
    want = [LONG, SHORT, [call[0], {**call[1], "content": ""}, *rows[2]["messages"][2:]]]
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
    (tmp_path / "test.csv").write_text("text,more\na,b,c\n")
    with pytest.raises(ConfigError, match=r"test.csv, row 1: not as many cells as the header"):
        load("rows", "test", tmp_path)
    (tmp_path / "test.csv").write_text("prompt,text,text\na,b,c\n")
    with pytest.raises(ConfigError, match=r"test.csv: two columns are called 'text'"):
        load("rows", "test", tmp_path)
    (tmp_path / "test.csv").write_text("text\n")
    with pytest.raises(ConfigError, match=r"test.csv: no rows"):
        load("rows", "test", tmp_path)


def test_a_file_that_is_no_parquet(tmp_path):
    import pyarrow.parquet

    (tmp_path / "test.parquet").write_text("no")
    with pytest.raises(ConfigError, match=r"test.parquet: invalid Parquet"):
        load("rows", "test", tmp_path)
    texts = pyarrow.array([b"good", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"test.parquet: invalid Parquet: .*can't decode"):
        load("rows", "test", tmp_path)


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


def test_a_folder_of_files_of_any_name(tmp_path):
    """Is the train split, in the order of the names; other splits are held out of it."""
    for i in range(6):
        turns = [[{"role": "user", "content": f"{i} {j}"}, SHORT[1]] for j in range(5)]
        write(tmp_path / f"part-{i}.jsonl", *({"messages": t} for t in turns))
    as_csv(tmp_path / "z.csv", {"text": "Once."})
    (tmp_path / "notes.txt").write_text("not rows")
    train, test = (load("rows", split, tmp_path) for split in ("train", "test"))
    prompts = {e.prompt for e in train} | {e.prompt for e in test}
    assert len(test) == 3 and len(train) == 31 - 3 - 3
    assert prompts < {f"{i} {j}" for i in range(6) for j in range(5)} | {""}
    forms = {e.form for e in train} | {e.form for e in test}
    assert forms <= {"messages", "text"} and "messages" in forms


@pytest.mark.parametrize("name", ["TEST-1", "test_sft", "my-test", "testing", "latest.dev"])
def test_a_file_that_seems_to_be_for_evaluation_is_not_trained_on(name, tmp_path):
    write(tmp_path / "my-train.jsonl", {"text": "Once."})
    path = write(tmp_path / f"{name}.jsonl", {"text": "Twice."})
    with pytest.raises(ConfigError, match=rf"{name}.jsonl may be meant for evaluation"):
        load("rows", "train", tmp_path)
    path.rename(tmp_path / "contest.jsonl")  # the word alone
    assert sorted(e.target for e in load("rows", "train", tmp_path)) == ["Once.", "Twice."]


def test_parts_of_splits_in_a_folder(tmp_path):
    """As the hub lays them out; a file that is of no split is not left out in silence."""
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
    """Each in three lengths; the system's turn is a part of how they begin."""
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
    rows += [
        {"messages": [turn("user", f"{i}?"), turn("assistant", "yes")]} for i in range(100 - usual)
    ]
    write(tmp_path / "train.jsonl", *rows)
    parts = [load("rows", split, tmp_path) for split in ("train", "validation", "test")]
    held_out = min(10, (100 - usual) // 2)
    assert [len(part) for part in parts] == [100 - 2 * held_out, held_out, held_out]
    assert [sum(e.turns[0]["content"] == opening for e in part) for part in parts] == [usual, 0, 0]


def test_nulls_are_nothing(tmp_path):
    """As Arrow and CSV files have them in every column that another row fills."""
    rows = [{"instruction": "a", "input": None, "output": "b"}]
    rows += [{"instruction": "a", "input": "c", "output": "d"}]
    as_parquet(tmp_path / "test.parquet", *rows)
    assert [e.input for e in load("rows", "test", tmp_path)] == ["", "c"]
    (tmp_path / "test.parquet").unlink()
    as_csv(tmp_path / "test.csv", {"messages": "", "text": "Once."})
    assert load("rows", "test", tmp_path)[0].form == "text"
    (tmp_path / "test.csv").unlink()
    calls = [{"function": {"name": "f", "arguments": {"a": 1}}}]
    others = [{"function": {"name": "f", "arguments": {"b": 2}}}]
    turns = [
        [SHORT[0], {"role": "assistant", "content": "", "tool_calls": c}] for c in (calls, others)
    ]
    as_parquet(tmp_path / "test.parquet", *({"messages": t} for t in turns))
    found = [e.turns[1]["tool_calls"] for e in load("rows", "test", tmp_path)]
    assert found == [calls, others]


def test_a_list_as_text_is_a_text(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "[3, 1]", "completion": "[1, 3]"})
    (example,) = load("rows", "train", path)
    assert (example.prompt, example.target) == ("[3, 1]", "[1, 3]")


def test_what_no_text_is(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "\\ud83d"}')
    with pytest.raises(ConfigError, match=r"a.jsonl, row 2: output is no Unicode text"):
        load("rows", "train", path)


def test_what_fails_in_one_process_is_told_to_all(tmp_path, monkeypatch):
    write(tmp_path / "test.jsonl", *CHATS)
    examples, tokenizer, sent = load("rows", "test", tmp_path), byte_tokenizer(), []
    monkeypatch.setattr(tokenization, "encode_examples", lambda *_: 1 / 0)
    share = Share(0, 2, lambda own: sent.append(own) or [own, own])
    with pytest.raises(ZeroDivisionError):
        tokenize_examples(examples, tokenizer, DataConfig(bucket_lengths=(999,)), None, share)
    share = Share(1, 2, lambda own: [*sent, own])
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        tokenize_examples(examples, tokenizer, DataConfig(bucket_lengths=(999,)), None, share)


def test_what_one_process_refuses_all_refuse(tmp_path):
    write(tmp_path / "test.jsonl", *CHATS, {"messages": [SHORT[1], *SHORT]})
    examples, tokenizer = load("rows", "test", tmp_path), byte_tokenizer()
    sent = []
    for index in range(2):  # what each sends
        share = Share(index, 2, lambda own: sent.append(own) or [own, own])
        with contextlib.suppress(ConfigError):
            tokenize_examples(examples, tokenizer, DataConfig(bucket_lengths=(999,)), None, share)
    for index in range(2):
        share = Share(index, 2, lambda own: sent)
        with pytest.raises(ConfigError, match=r"test.jsonl, row 3: it begins with the assistant"):
            tokenize_examples(examples, tokenizer, DataConfig(bucket_lengths=(999,)), None, share)


def test_a_form_that_is_named(tmp_path):
    """A row of two forms; the form of the first row is that of all."""
    row = {"text": "Once.", "messages": SHORT}
    path = write(tmp_path / "a.jsonl", row, row)
    assert load("rows", "train", path)[0].form == "messages"
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


def test_the_form_is_said(tmp_path, caplog):
    with caplog.at_level("INFO"):
        load("rows", "train", write(tmp_path / "a.jsonl", {"text": "Once."}))
    assert "a.jsonl, train: rows of the form 'text' (data.row_format)" in caplog.text


def test_a_missing_file_says_what_may_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"Files may be .json, .jsonl, .csv, .parquet.*hub:OWNER"):
        load("rows", "train", tmp_path)


def test_the_former_name_of_the_task():
    assert get_task("json") is get_task("rows")


# --- named datasets -------------------------------------------------------------------------------


def test_names():
    assert named_dataset("hub:a/b") == NamedDataset("hub", "a/b")
    assert named_dataset("hub:a/b:c@{}_sft") == NamedDataset("hub", "a/b", "c", "{}_sft")
    assert named_dataset("tfds:glue:cola") == NamedDataset("tfds", "glue", "cola")
    assert named_dataset("tfds:ag_news") == NamedDataset("tfds", "ag_news")
    for wrong in ("hub:", "hub:a/b@sft", "tfds:"):
        with pytest.raises(ConfigError, match=r"names no dataset. Expected hub:OWNER/NAME"):
            named_dataset(wrong)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that `datasets` opens as it opens one of the hub; its name for data.data_dir."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder = tmp_path / "named"
    folder.mkdir()
    return folder, f"hub:{folder}"


@pytest.mark.filterwarnings("ignore")  # of datasets' own
def test_a_dataset_of_the_hub(hub):
    folder, name = hub
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, SHORT[1]]} for i in range(40)]
    write(folder / "train.jsonl", *rows)
    write(folder / "test.jsonl", *CHATS)
    assert turns_of(load_examples("rows", "test", DataConfig(data_dir=name))) == [LONG, SHORT]
    train, held_out = (
        load_examples("rows", split, DataConfig(data_dir=name)) for split in ("train", "validation")
    )
    assert (len(train), len(held_out)) == (36, 4)
    assert {e.prompt for e in train}.isdisjoint(e.prompt for e in held_out)
    (folder / "train.jsonl").unlink()
    assert turns_of(load_examples("rows", "test", DataConfig(data_dir=name))) == [LONG, SHORT]
    write(folder / "train.jsonl", *rows)
    with pytest.raises(ConfigError, match=r"the splits train, test: none is 'train_sft'.*@{}_sft"):
        load_examples("rows", "train", DataConfig(data_dir=f"{name}@{{}}_sft"))
    with pytest.raises(ConfigError, match=r"'.*nowhere' cannot be read from the Hugging Face hub"):
        load_examples("rows", "train", DataConfig(data_dir=f"{name}/nowhere"))


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
    data = DataConfig(data_dir="tfds:stories")
    assert sorted(e.target for e in load_examples("rows", "test", data)) == ["b 0", "b 1"]
    assert len(load_examples("rows", "train", data)) == 27
    with pytest.raises(ConfigError, match=r"TFDS dataset 'storys' cannot be prepared"):
        load_examples("rows", "train", DataConfig(data_dir="tfds:storys"))
