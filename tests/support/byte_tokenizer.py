"""A Hugging Face tokenizer made of nothing but bytes: no file, no network, 259 ids."""

from __future__ import annotations

from typing import Any

BOS, EOS, PAD = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + eos_token +"
    " '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def byte_tokenizer(
    add_bos: bool = False, chat_template: str | None = CHAT_TEMPLATE, pair: str = ""
) -> Any:
    """A PreTrainedTokenizerFast: ids 0-255 are bytes, 256 <bos>, 257 <eos>, 258 <pad>; `add_bos`
    starts every text with <bos>. pair: two characters that make one token, 256, when they meet;
    the ids behind it are then one higher.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate([*_byte_chars(), *([pair] if pair else [])])},
            merges=[tuple(pair)] if pair else [],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def _byte_chars() -> list[str]:
    """The stand-in that the ByteLevel pre-tokenizer writes for each byte: itself if printable, else
    the next free code point from 256.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    free = iter(range(256, 512))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]
