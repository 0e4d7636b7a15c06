"""Tokenizers written into GGUF files: what is read back cuts texts in the same way, and what the
format cannot say is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf.test_hf_gguf import PIECES, sentencepiece
from support.byte_tokenizer import byte_tokenizer
from support.huggingface import hf_model, write_gguf
from support.models import tiny_model

from zflora_jax import load_model, resize_vocab, save_gguf
from zflora_jax.core.fields import ConfigError
from zflora_jax.hf.gguf_merges import merges_as_scores
from zflora_jax.hf.gguf_reader import GGUFFile
from zflora_jax.hf.gguf_split import _SPLITS, pre_tokenizer, pre_tokenizer_name

LLAMA3, QWEN2 = _SPLITS
TEXT = "xyz don't 12345  THE the\n\nend"


def merging(cut: str, ignore_merges: bool = False) -> Any:
    """A byte-level tokenizer that merges "t h", "th e" and digits, with texts cut by `cut`."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = byte_tokenizer()
    vocab = tokenizer.get_vocab()
    chars = sorted((c for c in vocab if vocab[c] < 256), key=vocab.get)
    merges = [("t", "h"), ("th", "e"), ("1", "2"), ("12", "3"), ("3", "4")]
    tokens = [*chars, *("".join(merge) for merge in merges), "xyz"]  # which no merge makes
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=ignore_merges,
        )
    )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = {
        "gpt-2": [bytes_],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), bytes_],
    }
    split = {"qwen2": QWEN2}.get(cut, LLAMA3 if cut in ("llama-bpe", "smaug-bpe") else cut)
    regex = [
        pre_tokenizers.Split(Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    steps = parts.get(cut, regex)
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    backend.decoder = tokenizer.backend_tokenizer.decoder
    backend.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def with_tokenizer(tokenizer: Any, **changes: Any) -> Any:
    size = len(tokenizer)
    model = tiny_model(vocab_size=size + 3, eos_token_ids=(tokenizer.eos_token_id,), **changes)
    model.tokenizer = tokenizer
    return model


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2"])
def test_byte_level_tokenizers_make_the_round(pre: str, tmp_path: Path) -> None:
    model = with_tokenizer(merging(pre, ignore_merges=pre == "llama-bpe"))
    report = save_gguf(tmp_path / "x.gguf", model, "f32")
    assert f"pre-tokenizer {pre}" in report["tokenizer"]
    file, found = GGUFFile(tmp_path / "x.gguf"), load_model(tmp_path / "x.gguf")
    assert file.get("tokenizer.ggml.pre") == pre
    assert file.get("tokenizer.ggml.tokens")[-1].startswith("[PAD")  # ids without a token
    assert file.get("tokenizer.ggml.token_type")[-6:] == [3, 3, 3, 5, 5, 5]
    for text in (TEXT, "one <eos> two"):
        assert found.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_a_cut_does_not_depend_on_what_transformers_knows(monkeypatch) -> None:
    """Releases before 5.24 leave GPT-2's; an unknown name gives no tokenizer, not another's."""
    for pre in ("llama-bpe", "qwen2", "smollm", "gpt-2"):
        backend = merging("gpt-2")
        backend.backend_tokenizer.pre_tokenizer = pre_tokenizer(pre)
        assert backend(TEXT)["input_ids"] == merging(pre)(TEXT)["input_ids"]
    with pytest.raises(ConfigError, match="pre-tokenizer 'viking' is not known"):
        pre_tokenizer("viking")


def test_a_file_with_an_unknown_cut_has_no_tokenizer(tmp_path: Path) -> None:
    save_gguf(tmp_path / "x.gguf", with_tokenizer(merging("gpt-2")), "f32")
    data = (tmp_path / "x.gguf").read_bytes()
    assert data.count(b"gpt-2") == 1
    (tmp_path / "y.gguf").write_bytes(data.replace(b"gpt-2", b"vikin"))
    with pytest.warns(UserWarning, match="pre-tokenizer 'vikin' is not known"):
        assert load_model(tmp_path / "y.gguf").tokenizer is None


def test_cuts_differ_in_what_they_merge() -> None:
    """Otherwise the test above could not fail."""
    ids = {cut: merging(cut)(TEXT)["input_ids"] for cut in ("gpt-2", "smollm", "qwen2")}
    assert len(ids["smollm"]) > len(ids["gpt-2"]) and len(ids["qwen2"]) > len(ids["gpt-2"])
    whole = merging("llama-bpe", ignore_merges=True)(TEXT)["input_ids"]
    assert len(whole) == len(merging("smaug-bpe")(TEXT)["input_ids"]) - 2


def test_a_cut_without_a_name_is_refused(tmp_path: Path) -> None:
    model = with_tokenizer(merging(r"\w+|\W+"))
    with pytest.raises(ConfigError, match=r"pre_tokenizer.*none that can be named.*llama-bpe"):
        save_gguf(tmp_path / "x.gguf", model)
    state = {
        "normalizer": {"type": "Lowercase"},
        "model": {"merges": [["a", "b"]]},
        "pre_tokenizer": None,
    }
    with pytest.raises(ConfigError, match="Lowercase"):
        pre_tokenizer_name(state)
    assert not list(tmp_path.iterdir())


def test_what_is_read_back_otherwise_is_refused(tmp_path: Path) -> None:
    """A special token that takes the space before it: a GGUF file has no word for that."""
    from tokenizers import AddedToken

    tokenizer = merging("gpt-2")
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, special=True)], special_tokens=True)
    tokenizer.add_special_tokens({"sep_token": AddedToken("<tool>", lstrip=True)})
    with pytest.raises(ConfigError, match="'one <tool> two' gives"):
        save_gguf(tmp_path / "x.gguf", with_tokenizer(tokenizer))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_vocabularies_make_the_round(space: bool, tmp_path: Path) -> None:
    """Written from the transformers tokenizer that our reader builds of such a file."""
    write_gguf(
        tmp_path / "old.gguf",
        hf_model(vocab_size=len(PIECES)),
        tokenizer=lambda writer: sentencepiece(writer, add_space_prefix=space),
    )
    model = load_model(tmp_path / "old.gguf")
    copied = save_gguf(tmp_path / "copied.gguf", model)
    model.source = None
    report = save_gguf(tmp_path / "new.gguf", model)
    assert "copied" in copied["tokenizer"] and "sentencepiece" in report["tokenizer"]
    for name in ("copied", "new"):
        found = load_model(tmp_path / f"{name}.gguf")
        for text in ("abb a ab", "b"):
            assert found.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    file = GGUFFile(tmp_path / "new.gguf")
    assert file.get("tokenizer.ggml.token_type") == [2, 3, 3, *[6] * 256, *[1] * 6]
    assert file.get("tokenizer.ggml.add_space_prefix") is space


def test_merges_that_scores_cannot_order_are_refused() -> None:
    tokens, types = ["a", "b", "c", "ab", "bc", "abc"], [1] * 6
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    scores = merges_as_scores(tokens, types, merges)
    assert scores[3:] == [0.0, -1.0, -2.0] and max(scores[:3]) < -3
    with pytest.raises(ConfigError, match="'abc' do not follow each other"):
        merges_as_scores(tokens, types, [merges[2], *merges[:2], merges[3]])
    with pytest.raises(ConfigError, match="does not merge 'a' and 'bc'"):
        merges_as_scores(tokens, types, merges[:3])


def test_end_tokens_and_templates_are_the_models(tmp_path: Path) -> None:
    model = with_tokenizer(byte_tokenizer())
    model.config = model.config.replace(eos_token_ids=(257, 65, 66, 67))
    model.tokenizer.chat_template = {"default": "{{ 'a' }}", "tools": "{{ 'b' }}"}
    report = save_gguf(tmp_path / "x.gguf", model)
    assert "end tokens without a place in the file: [67]" in report["tokenizer"]
    file = GGUFFile(tmp_path / "x.gguf")
    names = ("eos", "eot", "eom")
    assert [file.get(f"tokenizer.ggml.{name}_token_id") for name in names] == [257, 65, 66]
    assert file.get("tokenizer.chat_templates") == ["tools"]
    assert file.get("tokenizer.chat_template.tools") == "{{ 'b' }}"
    again = load_model(tmp_path / "x.gguf")
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert save_gguf(tmp_path / "z.gguf", again)["tokenizer"].startswith("copied")
    assert GGUFFile(tmp_path / "z.gguf").get("tokenizer.chat_template.tools") == "{{ 'b' }}"
    del model.tokenizer.chat_template["default"]
    save_gguf(tmp_path / "w.gguf", model)
    assert load_model(tmp_path / "w.gguf").tokenizer.chat_template == {"tools": "{{ 'b' }}"}
    # A copy of a file's own keys takes the changed ones.
    again.tokenizer.chat_template, again.config = "new", again.config.replace(eos_token_ids=(65,))
    report = save_gguf(tmp_path / "y.gguf", again)
    assert report["tokenizer"].startswith("copied")
    file = GGUFFile(tmp_path / "y.gguf")
    assert file.get("tokenizer.chat_template") == "new"
    assert file.get("tokenizer.ggml.eos_token_id") == 65
    assert file.get("tokenizer.ggml.eot_token_id") is None


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = with_tokenizer(byte_tokenizer())
    model.tokenizer = merging("gpt-2")
    model.config = model.config.replace(vocab_size=259)
    with pytest.raises(ConfigError, match=r"has the id 2.*vocabulary only 259"):
        save_gguf(tmp_path / "x.gguf", model)
    model.tokenizer = object()
    with pytest.raises(ConfigError, match=r"is a object.*model.tokenizer = None"):
        save_gguf(tmp_path / "x.gguf", model)


def test_a_vocabulary_of_a_file_may_be_made_longer(tmp_path: Path) -> None:
    """By a number: the new rows have names, whether the file's own keys are copied or not."""
    model = with_tokenizer(byte_tokenizer())
    size = model.config.vocab_size + 12
    save_gguf(tmp_path / "a.gguf", model)
    longer = resize_vocab(load_model(tmp_path / "a.gguf"), size)
    assert save_gguf(tmp_path / "b.gguf", longer)["tokenizer"].startswith("copied")
    file = GGUFFile(tmp_path / "b.gguf")
    tokens, types = (file.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    assert len(tokens) == len(types) == size and tokens[-1] == f"[PAD{size - 1}]"
    assert load_model(tmp_path / "b.gguf").config.vocab_size == size
