"""The token that a run learns to end its answers with, and the tokenizer, reach stock software.

The directory is like Llama 3.2's: the template closes a turn with <|eot_id|>, the tokenizer's EOS
is <|end_of_text|>, and the tokens of the template are in added_tokens_decoder alone.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
import transformers
from support.byte_tokenizer import byte_tokenizer
from support.models import tiny_model
from support.runs import EVAL, TASK_DATA, small_run

from zflora_jax import Model, TrainConfig, export_run, load_model, save_hf, train
from zflora_jax.data.encoding import encode_examples
from zflora_jax.data.prompts import end_token
from zflora_jax.data.tasks import Example
from zflora_jax.evaluation.records import generation_records
from zflora_jax.experiments.restore import load_fused
from zflora_jax.inference.text import answer_text, generate, stop_ids

NAMES = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
NAMES = tuple(f"<|{name}|>" for name in NAMES)
BOS, EOS, HEADER, HEADER_END, EOT = range(256, 261)
TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def llama3_tokenizer(special: bool = True) -> Any:
    """special: whether the template's tokens carry that flag; in neither case does
    special_tokens_map name them.
    """
    from tokenizers import AddedToken, Tokenizer, processors

    backend = json.loads(byte_tokenizer().backend_tokenizer.to_str()) | {"added_tokens": []}
    tokenizer = Tokenizer.from_str(json.dumps(backend))
    tokenizer.add_special_tokens(list(NAMES[:2]))
    tokenizer.add_tokens([AddedToken(x, special=special, normalized=False) for x in NAMES[2:]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{NAMES[0]} $A", special_tokens=[(NAMES[0], BOS)]
    )
    names = {"bos_token": NAMES[0], "eos_token": NAMES[1], "clean_up_tokenization_spaces": False}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TEMPLATE
    assert EOT not in fast.all_special_ids and EOT in fast.added_tokens_decoder
    return fast


def write_directory(path: Path, special: bool = True) -> Path:
    """A base as the hub has it: its own tokenizer files and generation_config.json, made by
    transformers.
    """
    ids = {"vocab_size": 261, "bos_token_id": BOS, "eos_token_ids": (EOS,), "pad_token_id": None}
    model = tiny_model(num_layers=2, tie_word_embeddings=False, **ids)
    model.params = jax.tree.map(lambda x: x / 4, model.params)
    save_hf(path, model)
    for name in ("zflora.json", "README.md"):
        (path / name).unlink()
    llama3_tokenizer(special).save_pretrained(path)
    settings = {"bos_token_id": BOS, "eos_token_id": EOS, "temperature": 0.6, "do_sample": True}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("llama3") / "base")


@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_turn_may_be_in_added_tokens_alone(special):
    tokenizer = llama3_tokenizer(special)
    assert end_token(tokenizer, "alpaca") == EOS
    [(tokens, _)] = encode_examples([Example("q", "a")], tokenizer, TASK_DATA)
    assert tokens[-1] == EOT
    # Ordinary text ends turns; or there is no template, which is refused where it renders.
    no_token = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    spaced = TEMPLATE.replace("'<|eot_id|>'", "' <|eot_id|>'")
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
    ends = ((TEMPLATE, EOT), (spaced, EOT), (strict + TEMPLATE, EOT), (no_token, EOS), (None, EOS))
    for template, end in ends:
        tokenizer.chat_template = template
        assert end_token(tokenizer, "chat") == end


def test_answers_do_not_keep_an_end_token_that_is_not_special(monkeypatch):
    """Its tokenizer decodes it as text."""
    tokenizer = llama3_tokenizer(special=False)
    assert tokenizer.decode([65, EOT], skip_special_tokens=True) == "A<|eot_id|>"
    answer = [*b"hi ", HEADER, *b"there", EOT]
    text = "hi <|start_header_id|>there"  # in the middle it is what the model said
    model = tiny_model(vocab_size=261, bos_token_id=BOS, eos_token_ids=(EOS,))
    model.tokenizer = tokenizer
    assert answer_text(tokenizer, answer, stop_ids(model, "chat")) == text
    given = [answer, answer[:-1], []]
    monkeypatch.setattr("zflora_jax.inference.text.generate_tokens", lambda *_, **__: given)
    assert generate(model, ["a", "b", "c"], chat=True) == [text, text, ""]
    monkeypatch.setattr("zflora_jax.evaluation.records.generate_tokens", lambda *_, **__: [answer])
    examples = [Example("a", "b", answer="1")]
    [record] = generation_records(model, "arithmetic", examples, TASK_DATA, EVAL)
    assert record["output"] == text and not record["cut"]


def test_an_export_stops_at_what_was_trained(directory, tmp_path, monkeypatch):
    """As a new user would: train, export, load with stock transformers, generate."""
    # Other tests have what it says of the export's numbers.
    monkeypatch.setattr("zflora_jax.evaluation.export_gap.export_gap", lambda *_, **__: {})
    settings = TrainConfig(steps=3, save_every=None, log_every=1, loss_chunk=128)
    run = dataclasses.replace(small_run(str(directory)), train=settings)
    trained = train(run, tmp_path / "run", console=False)
    assert trained.model.config.eos_token_ids == (EOS, EOT)
    assert load_fused(tmp_path / "run")[0].config.eos_token_ids == (EOS, EOT)
    report = export_run(tmp_path / "run", tmp_path / "out")
    out = tmp_path / "out"
    wanted = {"bos_token_id": BOS, "eos_token_id": [EOS, EOT]}
    wanted |= {"temperature": 0.6, "do_sample": True}
    assert json.loads((out / "generation_config.json").read_text()) == wanted
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [EOS, EOT]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (directory / name).read_bytes()
        assert name in report["files"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "1 + 1?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.chat_template == TEMPLATE and ids[0] == BOS and ids[-3] == HEADER_END
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()

    def eot_at_the_third(given: Any, scores: Any) -> Any:
        scores[:, EOT] = 1e9 if given.shape[1] == len(ids) + 2 else -1e9
        scores[:, EOS] = -1e9  # a draw might end the answer earlier
        return scores

    processors = transformers.LogitsProcessorList([eot_at_the_third])
    options = {"max_new_tokens": 8, "logits_processor": processors, "pad_token_id": EOS}
    said = model.generate(torch.tensor([ids]), **options)
    assert said.shape[1] == len(ids) + 3 and said[0, -1] == EOT
    again = load_model(out)
    assert again.config.eos_token_ids == (EOS, EOT) and stop_ids(again, "chat") == [EOS, EOT]


# --- a tokenizer that was changed after loading ---------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_a_changed_tokenizer_is_written_and_read_back(bos, directory, tmp_path):
    from tokenizers.processors import TemplateProcessing

    model = load_model(directory)
    ours = model.tokenizer
    ours.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]})
    ours.add_tokens(["<note>"])
    ours.padding_side, ours.model_max_length = "left", 77
    if not bos:
        ours.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
        ours.eos_token, ours.chat_template = "<|eot_id|>", "<u>{{ messages[0]['content'] }}"
    save_hf(tmp_path / "out", model)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    names = ("chat_template", "eos_token_id", "pad_token_id", "padding_side", "model_max_length")
    chat = [{"role": "user", "content": "hi"}]
    theirs, same = (
        [getattr(x, name) for name in names]
        + [x("ab<tool><note> <|eot_id|>1")["input_ids"], len(x), sorted(x.all_special_ids)]
        + [x.apply_chat_template(chat, tokenize=False)]
        for x in (again, ours)
    )
    assert theirs == same
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # what transformers 4 knows too


def test_several_templates_and_no_tokenizer(directory, tmp_path):
    """Templates by name, as transformers writes them: a folder next to the default one; and the
    files of a base whose tokenizer was not loaded.
    """
    base = write_directory(tmp_path / "base")
    model = load_model(base)
    model.tokenizer.chat_template = {"default": TEMPLATE, "rag": "{{ messages[0]['content'] }}"}
    save_hf(tmp_path / "out", model)
    model.tokenizer.save_pretrained(base)
    without = Model(model.config, model.params, None, model.source)
    for name, saved in (("copied", load_model(base)), ("without", without)):
        report = save_hf(tmp_path / name, saved)
        assert "additional_chat_templates/rag.jinja" in report["files"]
    for name in ("out", "copied", "without"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.chat_template == model.tokenizer.chat_template
