"""transformers and PEFT: greedy decode, and LoRA's training step from a saved base.

Imports no jax, so that the memory of a process that trains is PEFT's only.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.fields import ConfigError, require, require_in
from zflora_jax.core.quantize_config import STORED, Stored
from zflora_jax.core.run_config import OptimConfig

OPTIM = OptimConfig(schedule="constant", warmup_steps=0, learning_rate=1e-3)
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One training set-up.

    Attributes:
      model: A source for `load_model`; presets other than smollm2-135m get random weights.
      dtype: Data type of the base.
      rank: Rank of the adapter.
      batch: Sequences per step.
      length: Tokens per sequence.
      masked: Share of positions, from the start, without loss.
      quantize: How the base's kernels are quantised, as `quantize.kernels` of a run.
    """

    model: str
    dtype: str = "float32"
    rank: int = 16
    batch: int = 8
    length: int = 128
    masked: float = 0.0
    quantize: Stored = "none"

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("batch", 1), ("length", 2)):
            value = getattr(self, name)
            require(value >= least, f"{name}={value}: must be at least {least}.")
        require(
            0 <= self.masked < 1,
            f"masked={self.masked}: a share of the positions, at least 0 and below 1.",
        )
        types = [name for name in STORED if name != "keep"]  # random models have no file
        require_in(types, self.quantize, f"quantize={self.quantize}")

    def batch_arrays(self, vocab_size: int) -> dict[str, np.ndarray]:
        """Makes random tokens, int32, and the loss mask, bool, each [batch, length], with at least
        one predicted token per sequence.
        """
        draw, shape = np.random.default_rng(0), (self.batch, self.length)
        first = min(max(1, round(self.masked * self.length)), self.length - 1)
        return {
            "tokens": draw.integers(0, vocab_size, shape).astype(np.int32),
            "loss_mask": np.broadcast_to(np.arange(self.length) >= first, shape),
        }


def peak_resident() -> float:
    """Returns the peak resident memory of this process, in bytes. Linux's ru_maxrss would count the
    parent's, from which it was forked.
    """
    status = Path("/proc/self/status")
    text = status.read_text(encoding="utf-8", errors="replace") if status.is_file() else ""
    if found := re.search(r"VmHWM:\s*(\d+) kB", text):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def imports() -> tuple[Any, Any, Any]:
    """Returns torch, transformers and peft.

    Raises:
      ConfigError: they are not installed; the message names the remedy.
    """
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"comparing with transformers and PEFT needs them ({error}); install with: pip install"
            " -e '.[test]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers, peft


def with_lora(model: Any, rank: int) -> Any:
    """Returns a transformers model with PEFT's LoRA on all seven kernels of a layer, scale 2."""
    _, _, peft = imports()
    return peft.get_peft_model(
        model,
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LINEAR, task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )


def quantization(case: Case) -> Any:
    """Returns transformers' settings that load a base with bitsandbytes.

    Raises:
      ConfigError: bitsandbytes has no such type, or is not installed.
    """
    torch, transformers, _ = imports()
    settings: dict[str, dict[str, Any]] = {
        "int8": {"load_in_8bit": True},
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": getattr(torch, case.dtype),
        },
    }
    if case.quantize not in settings:
        raise ConfigError(f"bitsandbytes has no {case.quantize}: compare {', '.join(settings)}.")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"PEFT's quantised bases need bitsandbytes ({error}); install with: pip install"
            " bitsandbytes"
        ) from None
    return transformers.BitsAndBytesConfig(**settings[case.quantize])


def train_step(case: Case, directory: str | Path, device: str) -> Callable[[], float]:
    """A function that trains one step of the base in `directory` and returns its loss. AdamW and
    the clip of the global norm are this project's; attention is torch's best; there is no gradient
    checkpointing.
    """
    torch, transformers, _ = imports()
    placed: dict[str, Any] = {}
    if case.quantize != "none":  # a quantised model cannot be moved to its device later
        placed = {"quantization_config": quantization(case), "device_map": {"": device}}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, case.dtype), **placed
    )
    model = with_lora(model if placed else model.to(device), case.rank).train()
    arrays = case.batch_arrays(model.config.vocab_size)
    tokens = torch.tensor(arrays["tokens"], dtype=torch.long, device=device)
    labels = tokens.masked_fill(torch.tensor(~arrays["loss_mask"], device=device), -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=OPTIM.learning_rate, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps, weight_decay=0.0
    )

    def run() -> float:
        loss = model(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels, use_cache=False
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return run


def device() -> str:
    """Returns torch's device."""
    torch, _, _ = imports()
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_stock(config: Any, dtype: str) -> Any:
    """The stock class of transformers of a LlamaConfig, with random weights of `dtype`."""
    from zflora_jax.hf.config import to_hf_config

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


def decode_baselines(
    config: Any, dtype: str, rank: int, batch: int, prompt_length: int
) -> dict[str, Any]:
    """Returns contenders: transformers' greedy `generate`, the same with PEFT's LoRA, and with that
    LoRA disabled; on a GPU also compiled with a static cache. config: A LlamaConfig.
    """
    from zflora_jax.experiments.latency import Contender

    torch, _, _ = imports()
    shape, generator = (batch, prompt_length), torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, shape, generator=generator)

    def made(model: Any, **settings: Any) -> Contender:
        model.generation_config.eos_token_id = None  # nothing ends an answer early
        tokens = ids.to(model.device)
        settings |= {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0}

        @torch.no_grad()
        def generate(count: int) -> Any:
            out = model.generate(tokens, do_sample=False, max_new_tokens=count, **settings)
            if tokens.is_cuda:
                torch.cuda.synchronize()
            return out

        return Contender(generate)

    plain, lora = random_stock(config, dtype), with_lora(random_stock(config, dtype), rank)
    found = {"transformers": made(plain), "transformers + PEFT lora": made(lora)}

    def idle(count: int) -> Any:
        with lora.disable_adapter():
            return found["transformers + PEFT lora"].generate(count)

    if plain.device.type == "cuda":
        for label, model in (("transformers", plain), ("transformers + PEFT lora", lora)):
            found[f"{label} compiled"] = made(model, cache_implementation="static")
    return found | {"transformers + PEFT idle": Contender(idle)}
