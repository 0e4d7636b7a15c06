"""`zflora data`: what is counted is what training gets; rows are shown with what is trained."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.chat import SHORT, turn
from support.runs import saved_base
from support.tasks import write

from zflora_jax.cli.main import main
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import DataConfig, RunConfig
from zflora_jax.data.encoding import tokenize_examples
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.pipeline import pack_sequences, train_batches
from zflora_jax.experiments.data_view import data_view
from zflora_jax.hf.load import model_tokenizer


def run_of(**data: object) -> RunConfig:
    settings = {"bucket_lengths": (128, 192, 320), "train_limit": 24, "batch_size": 4, **data}
    return RunConfig("tiny", AdapterConfig("lora"), DataConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_counted_is_what_training_gets(packing: bool) -> None:
    run, tokenizer = run_of(packing=packing), byte_tokenizer()
    view = data_view(run, tokenizer)
    apart = tokenize_examples(load_mixture(run.data, "train"), tokenizer, run.data)
    whole = pack_sequences(apart, 320) if packing else apart
    assert view.facts["sequences"] == len(apart) == sum(view.histogram.values())
    assert view.facts["tokens"] == sum(len(row.tokens) for row in apart.rows)
    assert view.facts.get("packed rows") == (len(whole) if packing else None)
    assert view.facts["steps of an epoch"] == -(-len(whole) // 4)
    longest = view.facts["longest"]  # a bucket holds its own length
    edge = data_view(run_of(packing=packing, bucket_lengths=(longest, 320)), tokenizer)
    assert edge.histogram == {f"1-{longest}": len(apart), f"{longest + 1}-320": 0}
    # An epoch as the pipeline makes it.
    batches = itertools.islice(train_batches(whole, run.data), len(whole) // 4)
    segments = np.concatenate([batch["segments"].ravel() for batch in batches])
    padding = np.mean(segments == 0)
    assert view.facts["padding, %"] == pytest.approx(100 * padding, abs=0.06)


def test_facts_of_a_mixture(tmp_path: Path) -> None:
    """The padding is that of its batches, where short rows lie beside long ones; steps of an epoch
    are only told without weights; and the forms of all rows are named.
    """
    chats = [{"messages": [turn("user", f"{i}"), SHORT[1]]} for i in range(9)]
    write(tmp_path / "train-1.jsonl", *chats)
    write(tmp_path / "train-2.jsonl", *({"text": f"Once {i}."} for i in range(15)))
    data = {"task": "rows+arithmetic", "data_dir": str(tmp_path), "train_limit": 24}
    facts = data_view(run_of(**data), byte_tokenizer()).facts
    alone = data_view(run_of(train_limit=24), byte_tokenizer()).facts["padding, %"]
    assert facts["padding, %"] > alone + 5 and facts["steps of an epoch"] > 0
    weighted = data_view(run_of(**data | {"task": "rows*1+arithmetic*3"}), byte_tokenizer()).facts
    assert "steps of an epoch" not in weighted
    own = data_view(run_of(**data | {"task": "rows"}), byte_tokenizer()).facts
    assert sorted(own["form of the rows"].split(", ")) == ["messages", "text"]


def test_rows_are_shown_with_what_is_trained() -> None:
    tokenizer = byte_tokenizer()
    run = run_of()
    view = data_view(run, tokenizer, 259, rows=2)
    assert len(view.rows) == 2
    example = load_mixture(run.data, "train")[0]
    (context, first), (answer, second) = view.rows[0]
    assert (first, second) == (False, True)
    assert example.prompt in context and answer == f"{example.target}<eos>"
    [(everything, trained)] = data_view(run_of(train_on_prompt=True), tokenizer, rows=1).rows[0]
    assert trained and everything == context + answer
    with pytest.raises(ConfigError, match="rows=-1"):
        data_view(run, tokenizer, rows=-1)
    with pytest.raises(ConfigError, match="258"):  # padding, as training refuses it
        data_view(run, tokenizer, 258)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, config = saved_base(tmp_path / "model", byte_tokenizer()), tmp_path / "config.py"
    made = f"RunConfig({base!r}, AdapterConfig('lora'), DataConfig(bucket_lengths=(320,)))"
    config.write_text(f"from zflora_jax.config import *\n\ndef get_config():\n    return {made}\n")
    words = ["data", "--config", str(config), "--rows", "1", "--out", str(tmp_path / "x")]
    assert main([*words, "--set", "data.train_limit=8"]) == 0
    said = capsys.readouterr().out
    assert "row 1, trained tokens in [[ ]]:" in said and "[[" in said.split("row 1")[1]
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["histogram"] == {"1-320": 8} and found["config"]["data"]["train_limit"] == 8
    assert main([*words, "--set", "data.task=gsm8k", f"data.data_dir={tmp_path}"]) == 2
    assert model_tokenizer(base)("a b")["input_ids"] == byte_tokenizer()("a b")["input_ids"]
