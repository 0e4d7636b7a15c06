"""Tokenizers of GGUF files: read as llama.cpp reads them, written so that texts are cut in the same
way, and refused where the format cannot say it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
from support.byte_tokenizer import byte_tokenizer
from support.gguf_files import PIECES, byte_level, sentencepiece
from support.huggingface import hf_model, write_gguf
from support.models import tiny_model
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from zflora_jax import ConfigError, Model, load_model, save_gguf, save_hf
from zflora_jax.hf.gguf.file import GGUFFile
from zflora_jax.hf.gguf.tokenizer import PRE_TOKENIZERS, pre_tokenizer

TEXT = "xyz don't 12345  THE the\n\nend"
NAMES = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken")


@pytest.mark.parametrize(
    ("vocabulary", "size", "ids"),
    [
        (sentencepiece, len(PIECES), [1, 264, 261]),
        (partial(sentencepiece, add_bos_token=False), len(PIECES), [264, 261]),
        (partial(sentencepiece, add_eos_token=True), len(PIECES), [1, 264, 261, 2]),
        (partial(sentencepiece, add_space_prefix=False), len(PIECES), [1, 263, 261]),
        (partial(byte_level, pre="llama-bpe"), 259, [256, 97, 98, 98]),
        (partial(byte_level, pre="llama-bpe", flag=False), 259, [97, 98, 98]),
        (partial(byte_level, pre="default", flag=True), 259, [256, 97, 98, 98]),
    ],
    ids=["silent", "no BOS", "both", "no space", "llama", "llama no BOS", "bytes BOS"],
)
def test_files_start_texts_as_llama_cpp_does(
    vocabulary: Any, size: int, ids: list[int], tmp_path: Path
) -> None:
    """Here, and in the export that stock transformers reads. llama-vocab.cpp: add_bos is true for
    sentencepiece and Llama 3's pre-tokenizer, add_space_prefix too, unless the file says no.
    """
    model = model_with(tmp_path / "x.gguf", vocabulary, size)
    save_hf(tmp_path / "out", model)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for tokenizer in (model.tokenizer, exported):
        assert len(tokenizer) == size and tokenizer("abb")["input_ids"] == ids
        plain = tokenizer("abb", add_special_tokens=False)["input_ids"]
        assert plain == [i for i in ids if i not in (1, 2, 256)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "abb"
    if size == len(PIECES):
        assert (model.config.bos_token_id, model.config.eos_token_ids) == (1, (2,))
        assert model.tokenizer.unk_token_id == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "mystery"}, "'mystery' is not known"),
        ({"pre": "viking"}, "pre-tokenizer 'viking' is not known"),
        ({"last": "<eos>"}, "259 tokens are listed, but only 258 differ"),
    ],
)
def test_an_unknown_tokenizer_is_left_out(changes: Any, words: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=words):
        model = model_with(tmp_path / "x.gguf", partial(byte_level, **changes), 259)
    assert model.tokenizer is None


def model_with(path: Path, vocabulary: Any, size: int = len(PIECES)) -> Model:
    """A model loaded from a file with the vocabulary that a function writes."""
    write_gguf(path, hf_model(vocab_size=size), tokenizer=vocabulary)
    return load_model(path)


def merging(name: str = "gpt-2", cut: Any = None, normalizer: Any = None) -> Any:
    """A byte-level tokenizer that merges "t h", "th e" and digits; texts are cut as llama.cpp does
    under a name, or by `cut`.
    """
    tokenizer, row = byte_tokenizer(), PRE_TOKENIZERS[name]
    vocab = tokenizer.get_vocab()
    chars = sorted((c for c in vocab if vocab[c] < 256), key=vocab.get)
    merges = [("t", "h"), ("th", "e"), ("1", "2"), ("12", "3"), ("3", "4")]
    tokens = [*chars, *("".join(merge) for merge in merges), "xyz"]  # which no merge makes
    ids = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=row.keeps_tokens))
    backend.pre_tokenizer = cut or pre_tokenizer(name)
    backend.decoder, backend.normalizer = tokenizer.backend_tokenizer.decoder, normalizer
    backend.add_special_tokens(["<bos>", "<eos>", "<｜pad▁｜>"])  # beyond the byte alphabet
    backend.add_tokens([AddedToken("<｜user｜>", normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<｜pad▁｜>"
    )


def with_tokenizer(tokenizer: Any) -> Model:
    model = tiny_model(vocab_size=len(tokenizer) + 3, eos_token_ids=(tokenizer.eos_token_id,))
    model.tokenizer = tokenizer
    return model


@pytest.mark.parametrize("name", NAMES)
def test_byte_level_tokenizers_make_the_round(name: str, tmp_path: Path) -> None:
    model = with_tokenizer(merging(name))
    save_gguf(tmp_path / "x.gguf", model, "f32")
    file, found = GGUFFile(tmp_path / "x.gguf"), load_model(tmp_path / "x.gguf")
    assert file.get("tokenizer.ggml.pre") == name
    assert file.get("tokenizer.ggml.tokens")[-1].startswith("[PAD")  # ids without a token
    assert file.get("tokenizer.ggml.token_type")[-7:] == [3, 3, 3, 4, 5, 5, 5]
    for text in (TEXT, "one <eos> two<｜pad▁｜><｜user｜>"):
        assert found.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_pre_tokenizers_differ_in_what_they_merge() -> None:
    """Otherwise the test above could not fail."""
    counts = {name: len(merging(name)(TEXT)["input_ids"]) for name in NAMES}
    assert counts["smollm"] > counts["gpt-2"] < counts["qwen2"] != counts["smaug-bpe"]
    assert counts["llama-bpe"] == counts["smaug-bpe"] - 2  # "xyz" is left unmerged
    cuts = {name: row.cut for name, row in PRE_TOKENIZERS.items()}
    same = cuts.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert len(same) > 9 and all(cuts[name] == GGUF_PRE_TOKENIZER_SPLITS[name] for name in same)


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_vocabularies_are_copied(space: bool, tmp_path: Path) -> None:
    old, new = tmp_path / "old.gguf", tmp_path / "new.gguf"
    model = model_with(old, lambda writer: sentencepiece(writer, add_space_prefix=space))
    report = save_gguf(new, model)
    assert report["tokenizer"].startswith("copied from the base's file")
    keys = GGUFFile(old).below("tokenizer.") | {"tokenizer.ggml.eos_token_id": 2}
    assert GGUFFile(new).below("tokenizer.") == keys  # llama.cpp assumes that id
    found = load_model(new)
    for text in ("abb a ab", "b"):
        assert found.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    model.source = None
    with pytest.raises(ConfigError, match=r"no byte-level BPE.*convert_hf_to.*base from a \.gguf"):
        save_gguf(tmp_path / "other.gguf", model)


def spaced() -> Any:
    """A special token that takes the space before it: a GGUF file has no word for that."""
    tokenizer = merging()
    tokenizer.add_special_tokens({"sep_token": AddedToken("<tool>", lstrip=True, special=True)})
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda: merging(cut=pre_tokenizers.Whitespace()), "none that can be named.*llama-bpe"),
        (lambda: merging(normalizer=normalizers.Lowercase()), "normalises texts.*Lowercase"),
        (spaced, "'one <tool> two' gives"),
        (object, r"tokenizer \(object.*no byte-level BPE.*model\.tokenizer = None"),
        (lambda: merging("llama-bpe"), r"has 266 tokens.*vocabulary 259"),
    ],
)
def test_what_a_file_cannot_express_is_refused(tokenizer: Any, words: str, tmp_path: Path) -> None:
    found = tokenizer()
    model = tiny_model() if type(found) is object or "259" in words else with_tokenizer(found)
    model.tokenizer = found
    with pytest.raises(ConfigError, match=words):
        save_gguf(tmp_path / "x.gguf", model)
    assert not list(tmp_path.iterdir())


def test_end_tokens_and_the_template_are_the_models(tmp_path: Path) -> None:
    """In keys that are written, and in a copy of a file's own."""
    model, names = with_tokenizer(byte_tokenizer(add_bos=True)), ("eos", "eot", "eom")
    text, want = "aé 1<eos>", model.tokenizer("aé 1<eos>")["input_ids"]

    def saved(name: str) -> tuple[str, GGUFFile]:
        report = save_gguf(tmp_path / name, model)
        return report["tokenizer"], GGUFFile(tmp_path / name)

    model.config = model.config.replace(eos_token_ids=(257, 65, 66))
    model.tokenizer.chat_template = {"default": "{{ 'a' }}", "tools": "{{ 'b' }}"}
    _, file = saved("x.gguf")
    ends = [file.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    assert ends == [257, 65, 66] and file.get("tokenizer.chat_template") == "{{ 'a' }}"
    model = load_model(tmp_path / "x.gguf")
    assert model.config.eos_token_ids == (257, 65, 66) and model.config.bos_token_id == 256
    assert model.tokenizer(text)["input_ids"] == want
    assert model.tokenizer.chat_template == "{{ 'a' }}"
    model.tokenizer.chat_template, model.config = "new", model.config.replace(eos_token_ids=(65,))
    origin, file = saved("y.gguf")
    ends = [file.get(f"tokenizer.ggml.{name}_token_id") for name in names]
    assert origin.startswith("copied") and ends == [65, None, None]
    assert file.get("tokenizer.chat_template") == "new"
    model.config = model.config.replace(eos_token_ids=(1, 2, 3, 4))
    with pytest.raises(ConfigError, match="room for 3 end tokens"):
        saved("z.gguf")
