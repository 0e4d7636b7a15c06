"""TRL's SFTTrainer makes the tokens and the loss mask that training here makes of the same rows."""

import contextlib
import json
import warnings
from pathlib import Path

import pytest
from support.byte_tokenizer import EOS, byte_tokenizer
from support.chat import CHATML, LONG, SHORT, WITH_SYSTEM, messages, rows_of

from zflora_jax.core.run_config import DataConfig


@pytest.fixture(scope="module")
def trl_rows(tmp_path_factory):
    """trl_rows(rows, **settings) -> (tokens, whether each is learned) of TRL's SFTTrainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        import trl
        from transformers import LlamaConfig, LlamaForCausalLM

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = dict(zip((*sizes, "num_key_value_heads"), (8, 8, 1, 1, 1), strict=True))
    off = {"max_length": None, "report_to": "none", "use_cpu": True, "bf16": False}

    def prepare(rows, add_bos=False, template=CHATML, **settings):
        with warnings.catch_warnings(), contextlib.redirect_stderr(None):
            warnings.simplefilter("ignore")
            datasets.disable_progress_bars()
            folder = str(tmp_path_factory.mktemp("trl"))
            trainer = trl.SFTTrainer(
                LlamaForCausalLM(LlamaConfig(vocab_size=259, **shape)),
                trl.SFTConfig(output_dir=folder, **off, **settings),
                train_dataset=datasets.Dataset.from_list(json.loads(json.dumps(rows))),
                processing_class=byte_tokenizer(add_bos, template),
            )
            found = list(trainer.train_dataset)
        return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in found]

    return prepare


SHAREGPT = [{"from": t["role"], "value": t["content"]} for t in LONG]


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (messages(SHORT, LONG, WITH_SYSTEM), {"assistant_only_loss": True}),
        ([{"conversations": SHAREGPT}], {}),  # on all of it, as TRL has no other way
        ([{"prompt": LONG[:3], "completion": LONG[3:]}], {}),
        ([{"prompt": "1 + 1 =", "completion": " 2"}], {}),
        ([{"text": "Once."}], {}),
    ],
    ids=["messages", "conversations", "turns", "prompt", "text"],
)
def test_trl_makes_the_same(rows, settings, add_bos, trl_rows, tmp_path):
    """But for the BOS that a model is given before a conversation whose template writes none: TRL
    leaves it out there, and `zflora generate` does not.
    """
    data = DataConfig(bucket_lengths=(1024,), train_on_prompt="conversations" in rows[0])
    _, ours = rows_of(tmp_path, *rows, add_bos=add_bos, data=data)
    found = {tuple(tokens): mask for tokens, mask in trl_rows(rows, add_bos, **settings)}
    assert len(found) == len(ours) == len(rows)
    for row in ours.rows:
        skip = int(add_bos and "text" not in rows[0] and not isinstance(rows[0].get("prompt"), str))
        mask = found[tuple(row.tokens[skip:].tolist())]
        # Nothing predicts a first token.
        assert mask[1:] == row.loss_mask[skip:].tolist()[1:]
    assert EOS in ours.rows[0].tokens


@pytest.mark.parametrize("name", ["llama3_training", "qwen2_5_training", "qwen3_training"])
def test_trl_makes_the_same_of_its_own_templates(name, trl_rows, tmp_path):
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    template = (folder / f"{name}.jinja").read_text()
    rows = messages(SHORT, LONG, WITH_SYSTEM)
    _, ours = rows_of(tmp_path, *rows, template=template)
    theirs = trl_rows(rows, template=template, assistant_only_loss=True)
    for row, (tokens, mask) in zip(ours.rows, theirs, strict=True):
        assert (row.tokens.tolist(), row.loss_mask.tolist()) == (tokens, mask)
