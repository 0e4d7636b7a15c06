"""Rows of one's own beside other tasks, and texts that look like something else."""

from __future__ import annotations

import csv

import pytest
from support.chat import SHORT
from support.tasks import load, write

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig
from zflora_jax.data import builders, task
from zflora_jax.data.builders.rows import read_form
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.tasks import get_task


def test_a_form_is_for_own_rows_of_a_mixture_alone(tmp_path, monkeypatch):
    """Other tasks are read as ever, beside them in training and alone in an evaluation."""
    write(tmp_path / "train.jsonl", *({"text": f"{i}", "messages": SHORT} for i in range(30)))
    questions = [{"question": f"{i}?", "answer": f"{i} #### {i}"} for i in range(30)]
    write(tmp_path / "gsm8k" / "train.jsonl", *questions)
    data = DataConfig("rows+gsm8k", data_dir=str(tmp_path), row_format="text")
    forms = {example.form for example in load_mixture(data, "train")}
    assert forms == {"text", ""}
    assert load("gsm8k", "test", tmp_path, row_format="text")
    # The form would be a part of the name of the prepared rows.
    asked = []
    monkeypatch.setattr(task, "read_split", lambda *given, **_: asked.append(given[-1]))
    for name in ("rows", "gsm8k"):
        get_task(name).split("train", data)
    assert asked == ["text", ""]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ('{"name": "Ada"}', '[{"x": 1}]'),
        ('{"from": "Ada"}', '[{"from": "Bob"}]'),
        ("[]", "[]"),
        ("[" * 100_000, f"[{'1' * 5000}]"),
    ],
    ids=["object", "from", "empty", "beyond-python"],
)
def test_json_that_is_no_turn_is_a_text(tmp_path, prompt, completion):
    """Extraction from JSON to JSON, as JSON lines and as CSV."""
    row = {"prompt": prompt, "completion": completion}
    write(tmp_path / "a.jsonl", row)
    with (tmp_path / "b.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(row))
        table.writeheader()
        table.writerow(row)
    for name in ("a.jsonl", "b.csv"):
        (example,) = load("rows", "train", tmp_path / name)
        assert (example.prompt, example.target) == (row["prompt"], row["completion"])


@pytest.mark.parametrize("settings", ["[" * 100_000, "1" * 5000], ids=["deep", "long"])
def test_settings_that_python_cannot_read_are_no_object(tmp_path, settings):
    row = {"messages": SHORT, "chat_template_kwargs": settings}
    with pytest.raises(ConfigError, match=r"row 1: 'chat_template_kwargs' must be an object"):
        load("rows", "train", write(tmp_path / "a.jsonl", row))


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


@pytest.mark.parametrize("folder", ["hub:owner/name", "a.jsonl"])
def test_generated_problems_are_not_kept_where_rows_come_from(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", {"text": "a"})
    kept = []
    monkeypatch.setattr(
        builders, "open_prepared", lambda make, split, folder: kept.append(folder) or [0]
    )
    get_task("arithmetic").split("train", DataConfig(data_dir=folder))
    get_task("arithmetic").split("train", DataConfig(data_dir=str(tmp_path)))
    assert kept == [None, str(tmp_path)]


@pytest.mark.parametrize("answer", [{}, {"answer": "A"}])
def test_the_output_of_own_rows_is_learned_as_it_stands(answer):
    """LLM-Adapters' marker "A:" is a label of the options here, and spaces may be code's."""
    for output in ("A: Paris", "    return x\n"):
        row = {"instruction": "Which? A: Paris B: Rome", "output": output}
        [found] = read_form([("row 1", row | answer)])
        assert found["output"] == output


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"instruction": "a", "input": "", "output": "b", "prompt": "### a"}, "instruction"),
        ({"prompt": "### a", "question": "a", "answer": "#### 1"}, "question"),
        ({"prompt": "### a", "text": "### a b"}, "text"),
        (
            {"prompt": "a", "completion": "b", "instruction": "c", "output": "d"},
            "prompt-completion",
        ),
        ({"instruction": "a", "answer": "b", "output": ""}, "instruction"),
        ({"instruction": "Solve", "question": "a", "answer": "#### 1"}, "question"),
    ],
)
def test_a_form_is_recognised_by_all_that_it_needs(row, form):
    """As rendered prompts stand beside what they were made of."""
    [found] = read_form([("row 1", row)])
    assert found["form"] == form


def test_an_empty_cell_is_called_so(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,completion\na,b\nc,\n")
    with pytest.raises(ConfigError, match=r"row 2: no field 'completion'.*an empty cell"):
        load("rows", "train", tmp_path)
