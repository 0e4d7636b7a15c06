"""Prompts follow the style of a run, and the loss mask covers the target alone."""

from dataclasses import replace

import numpy as np
import pytest
from support.byte_tokenizer import BOS, EOS, byte_tokenizer

from zflora_jax import ConfigError, DataConfig
from zflora_jax.data import prompts
from zflora_jax.data.encoding import encode_prompts, tokenize_examples
from zflora_jax.data.tasks import Example


def test_alpaca_text_byte_for_byte():
    s = " " * 16
    plain = (
        "Below is an instruction that describes a task. Write a response that appropriately"
        f" completes the request.  \n\n{s}### Instruction:\n{s}Add\n1 and 2.\n{s}\n{s}###"
        f" Response:\n{s}"
    )
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides further"
        f" context. Write a response that appropriately completes the request. \n\n{s}###"
        f" Instruction:\n{s}Add.\n{s}\n{s}### Input:\n{s}1 2\n{s}\n{s}### Response:\n{s}"
    )
    for wanted, texts in ((plain, ("Add\n1 and 2.",)), (with_input, ("Add.", "1 2"))):
        assert prompts.render(None, "alpaca", *texts) == wanted
        # The evaluation scripts: one space less at the end of each header, and nothing on the
        # lines between.
        other = wanted.replace("request. ", "request.").replace(f"\n{s}\n", "\n\n")
        assert prompts.render(None, "alpaca-eval", *texts) == other


def test_wrong_styles_are_refused():
    with pytest.raises(ConfigError, match=r"chat template.*alpaca"):
        prompts.render(byte_tokenizer(chat_template=None), "chat", "Hi")
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        prompts.render(None, "alpacas", "Hi")
    without_eos = byte_tokenizer(chat_template=None)
    without_eos.eos_token = None
    with pytest.raises(ConfigError, match="no EOS"):
        prompts.end_token(without_eos, "alpaca")


@pytest.mark.parametrize("style", ["chat", "alpaca", "alpaca-eval"])
def test_the_loss_mask_covers_the_target_and_its_end_and_nothing_else(tokenizer, style):
    examples = [Example("2 and 3?", "2 + 3 = 5.", "5"), Example("é?", "日本", "1", input="x")]
    data = DataConfig(prompt_style=style, bucket_lengths=(512,))
    encoded = tokenize_examples(examples, tokenizer, data)
    on_prompt = tokenize_examples(examples, tokenizer, replace(data, train_on_prompt=True))
    generation = encode_prompts(examples, tokenizer, style)
    for example, (tokens, mask, _), (_, full_mask, _), prompt in zip(
        examples, encoded.rows, on_prompt.rows, generation, strict=True
    ):
        assert tokens.dtype == np.int32 and mask.dtype == np.bool_
        # Training conditions on exactly the tokens that generation starts from.
        assert tokens[~mask].tolist() == prompt
        assert tokens[mask].tolist() == [*example.target.encode(), EOS]
        assert np.diff(mask.astype(int)).tolist().count(1) == 1 and mask[-1]
        assert full_mask.all()


@pytest.mark.parametrize("writes_bos", ["<bos>", ""])
def test_exactly_one_bos_if_the_tokenizer_adds_one(writes_bos):
    template = writes_bos + "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    for style, add_bos in (("chat", True), ("alpaca", True), ("alpaca", False)):
        tokenizer = byte_tokenizer(add_bos=add_bos, chat_template=template)
        data = DataConfig(prompt_style=style)
        [(tokens, mask, _)] = tokenize_examples([Example("q", "t", "1")], tokenizer, data).rows
        assert tokens.tolist().count(BOS) == int(add_bos) == int(tokens[0] == BOS) and not mask[0]
