"""`zflora data`: what is counted is what training gets; rows are shown with what is trained."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.chat import SHORT, turn
from support.runs import saved_base
from support.tasks import write

from zflora_jax import AdapterConfig, ConfigError, DataConfig, RunConfig, preset
from zflora_jax.cli.main import main
from zflora_jax.data.encoding import Encoded, tokenize_examples
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.pipeline import pack_sequences, train_batches
from zflora_jax.experiments.data_view import data_view


def run_of(**data: object) -> RunConfig:
    settings = {"bucket_lengths": (128, 192, 320), "train_limit": 24, "batch_size": 4, **data}
    return RunConfig("tiny", AdapterConfig("lora"), DataConfig(**settings))  # type: ignore[arg-type]


def epoch(run: RunConfig) -> tuple[Encoded, Encoded, float]:
    """(The run's sequences, its rows, the padding of an epoch in %), as training has them."""
    apart = tokenize_examples(load_mixture(run.data, "train"), byte_tokenizer(), run.data)
    rows = pack_sequences(apart, run.data.bucket_lengths[-1]) if run.data.packing else apart
    batches = itertools.islice(train_batches(rows, run.data), max(1, len(rows) // 4))
    segments = np.concatenate([batch["segments"].ravel() for batch in batches])
    return apart, rows, 100 * float(np.mean(segments == 0))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("lengths", [(128, 192, 320), (100, 161)])
def test_what_is_counted_is_what_training_gets(packing: bool, lengths: tuple[int, ...]) -> None:
    run = run_of(packing=packing, bucket_lengths=lengths)
    view = data_view(run, byte_tokenizer())
    apart, whole, padding = epoch(run)
    sizes = [len(row.tokens) for row in apart.rows]
    assert view.facts["sequences"] == len(apart) == sum(view.histogram.values())
    low, high = map(int, next(iter(view.histogram)).split("-"))
    assert view.histogram[f"{low}-{high}"] == sum(low <= size <= high for size in sizes) > 0
    assert 1 < len(view.histogram) <= 8
    assert (view.facts["tokens"], view.facts["longest"]) == (sum(sizes), max(sizes))
    assert view.facts.get("packed rows") == (len(whole) if packing else None)
    assert view.facts["steps of an epoch"] == -(-len(whole) // 4)
    assert view.facts["padding, %"] == pytest.approx(padding, abs=0.06)


def test_facts_of_a_mixture(tmp_path: Path) -> None:
    """The padding is that of its batches, where short rows lie beside long ones; steps of an epoch
    are only told without weights; and the forms of all rows are named.
    """
    chats = [{"messages": [turn("user", f"{i}"), SHORT[1]]} for i in range(9)]
    write(tmp_path / "train-1.jsonl", *chats)
    write(tmp_path / "train-2.jsonl", *({"text": f"Once {i}."} for i in range(15)))
    data = {"task": "rows+arithmetic", "data_dir": str(tmp_path), "train_limit": 24}
    facts = data_view(run_of(**data), byte_tokenizer()).facts
    assert facts["padding, %"] == pytest.approx(epoch(run_of(**data))[2], abs=0.06)
    assert facts["steps of an epoch"] > 0
    weighted = data_view(run_of(**data | {"task": "rows*1+arithmetic*3"}), byte_tokenizer()).facts
    assert "steps of an epoch" not in weighted
    own = data_view(run_of(**data | {"task": "rows"}), byte_tokenizer()).facts
    assert sorted(own["form of the rows"].split(", ")) == ["messages", "text"]


def test_rows_are_shown_with_what_is_trained() -> None:
    tokenizer, run = byte_tokenizer(), run_of()
    view = data_view(run, tokenizer, preset("tiny"), rows=2)
    example = load_mixture(run.data, "train")[0]
    [[(one, context, first, size), (_, answer, second, more)], _] = view.rows
    assert (one, first, second) == (1, False, True) and more == len(example.target) + 1
    assert example.prompt in context and answer == f"{example.target}<eos>"
    whole = run_of(train_on_prompt=True)
    assert data_view(whole, tokenizer, rows=1).rows[0] == [(1, context + answer, True, size + more)]
    pairs = run_of(packing=True, bucket_lengths=(512,), train_on_prompt=True)
    packed = data_view(pairs, tokenizer, rows=1).rows[0]  # its sequences apart
    texts = ["".join(x[1] for x in packed if x[0] == i) for i in range(1, packed[-1][0] + 1)]
    assert len(texts) > 1 and all(x.count("<eos>") == 2 and x.endswith("<eos>") for x in texts)
    narrow = preset("tiny").replace(max_position_embeddings=165)
    with pytest.raises(ConfigError, match="rows=-1"):
        data_view(run, tokenizer, rows=-1)
    with pytest.raises(ConfigError, match="goes up to 320, beyond the model's context of 165"):
        data_view(run, tokenizer, narrow)
    with pytest.raises(ConfigError, match="258"):  # padding, as training refuses it
        data_view(run, tokenizer, preset("tiny").replace(vocab_size=258))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, config = saved_base(tmp_path / "model", byte_tokenizer()), tmp_path / "config.py"
    made = f"RunConfig({base!r}, AdapterConfig('lora'), DataConfig(bucket_lengths=(320,)))"
    config.write_text(f"from zflora_jax.config import *\n\ndef get_config():\n    return {made}\n")
    words = ["data", "--config", str(config), "--rows", "1"]
    assert main([*words, "--set", "data.train_limit=8"]) == 0
    said = capsys.readouterr().out
    assert "row 1, trained tokens in [[ ]]:\n-- sequence 1 of 1," in said and "█" in said
    assert re.search(r"examples +│ 8 ", said)
    assert main([*words, "--set", "data.task=gsm8k", f"data.data_dir={tmp_path}"]) == 2
