"""The same measurements of transformers and PEFT (the test extra installs them), by turns in the
same process.
"""

from __future__ import annotations

from typing import Any

import jax

from zflora_jax.bench.peft import imports, with_lora
from zflora_jax.bench.timing import Contender
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.config import to_hf_config

TRANSFORMERS, PEFT_LORA, PEFT_IDLE = (
    "transformers",
    "transformers + PEFT lora",
    "transformers + PEFT idle",
)


def device() -> str:
    """torch's device: the kind of device that jax uses."""
    torch, _, _ = imports()
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def random_stock(config: LlamaConfig, dtype: str) -> Any:
    """The stock class of transformers with random weights, on `device()`.

    Args:
      config: its shape.
      dtype: of its weights.
    """
    torch, transformers, _ = imports()
    left_out = ("architectures", "torch_dtype", "model_type")
    given = {k: v for k, v in to_hf_config(config, dtype).items() if k not in left_out}
    settings = transformers.AutoConfig.for_model(config.family, **given)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device()):
            return transformers.AutoModelForCausalLM.from_config(settings).eval()
    finally:
        torch.set_default_dtype(before)


def decode_contenders(
    config: LlamaConfig, dtype: str, rank: int, batch: int, prompt_length: int
) -> dict[str, Contender]:
    """transformers' greedy `generate` alone, with PEFT's LoRA, and with that LoRA disabled; on a
    GPU also compiled with a static cache.

    Args:
      config: the shape.
      dtype: of the weights.
      rank: of the LoRA.
      batch: number of prompts.
      prompt_length: tokens of a prompt.

    Returns:
      Label -> contender.
    """
    torch, _, _ = imports()
    ids = torch.randint(
        0, config.vocab_size, (batch, prompt_length), generator=torch.Generator().manual_seed(0)
    )

    def made(model: Any, **settings: Any) -> Contender:
        model.generation_config.eos_token_id = None  # nothing ends an answer early
        tokens = ids.to(model.device)
        mask = torch.ones_like(tokens)

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def generate(count: int) -> Any:
            out = model.generate(
                tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=count,
                pad_token_id=0,
                **settings,
            )
            if tokens.is_cuda:
                torch.cuda.synchronize()
            return out

        return Contender(generate)

    plain, lora = random_stock(config, dtype), with_lora(random_stock(config, dtype), rank)

    def idle(count: int) -> Any:
        with lora.disable_adapter():
            return found[PEFT_LORA].generate(count)

    found = {TRANSFORMERS: made(plain), PEFT_LORA: made(lora)}
    found[PEFT_IDLE] = Contender(idle)
    if plain.device.type == "cuda":
        found |= {
            f"{TRANSFORMERS} compiled": made(plain, cache_implementation="static"),
            f"{PEFT_LORA} compiled": made(lora, cache_implementation="static"),
        }
    return found
