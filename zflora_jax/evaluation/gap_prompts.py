"""What an export's logits are compared on: held-out rows of its run, or built-in texts."""

from __future__ import annotations

import logging

from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import RunConfig
from zflora_jax.data.encoding import encode_prompts, fit_documents
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.prompts import encode_prompt_texts

log = logging.getLogger(__name__)

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "A baker has 24 boxes with 13 cakes each and sells 57 of them. How many are left?",
    "def add(a, b):\n    return a + b\n",
    (
        "Question: which of these is a liquid at room temperature?\nA. iron\nB. water\nC."
        " salt\nAnswer: B"
    ),
)
ROWS = 8


def gap_prompts(run: RunConfig, model: Model) -> tuple[list[list[int]], str]:
    """Prompts to compare an export of `run` with its model on.

    Returns:
      (token ids of each prompt, what they are): those of the first held-out rows, or of `TEXTS`
      where the run's data cannot be read any more or has no prompts, which the log says. No
      prompt is longer than the model's context, or than the run's rows could be.
    """
    data = run.data
    try:
        whole = load_mixture(data, run.eval.split, ROWS)
        longest = min(data.bucket_lengths[-1], model.config.max_position_embeddings)
        rows = fit_documents(whole, model.tokenizer, data.prompt_style, longest, data.date)
        prompts = encode_prompts(rows, model.tokenizer, data.prompt_style, data.date)
        return [ids[:longest] for ids in prompts], f"{len(rows)} held-out rows"
    except (ConfigError, OSError) as error:
        log.warning(
            "the export is compared on built-in texts, as the run's held-out rows give no prompts:"
            " %s",
            error,
        )
        return encode_prompt_texts(model.tokenizer, TEXTS), f"{len(TEXTS)} built-in texts"
