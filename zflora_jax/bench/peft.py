"""PEFT's LoRA and its training step, from a saved model. Imports no jax, so the memory of its
process is PEFT's alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zflora_jax.bench.case import OPTIM, Case, peak_resident
from zflora_jax.core.fields import ConfigError

_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def imports() -> tuple[Any, Any, Any]:
    """torch, transformers and peft; ConfigError with the remedy where they are not installed."""
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
    """PEFT's LoRA on all seven kernels of every layer, scale 2.

    Args:
      model: of transformers.
      rank: of the LoRA.
    """
    _, _, peft = imports()
    return peft.get_peft_model(
        model,
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_LINEAR, task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )


def quantization(case: Case) -> Any:
    """transformers' settings that load a base with bitsandbytes.

    Args:
      case: quantize, a kind of codes, and dtype are read.

    Raises:
      ConfigError: bitsandbytes has no such kind, or is not installed.
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
    """A function that trains one step and returns its loss.

    AdamW and the clip of the global norm are this project's; attention is torch's best; there is no
    gradient checkpointing.

    Args:
      case: the set-up.
      directory: the saved base.
      device: torch's.
    """
    torch, transformers, _ = imports()
    # A quantised model is made on its device: transformers refuses to move it there.
    placed: dict[str, Any] = {}
    if case.quantize != "none":
        placed = {"quantization_config": quantization(case), "device_map": {"": device}}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, case.dtype), **placed
    )
    model = model if placed else model.to(device)
    model = with_lora(model, case.rank).train()
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


def main() -> None:
    """Read a job (JSON) from stdin, train its steps, and print [peak memory in bytes, seconds from
    the start to the end of the first step].
    """
    job = json.load(sys.stdin)
    torch, _, _ = imports()
    started = time.perf_counter()
    run = train_step(Case(**job["case"]), job["directory"], job["device"])
    run()
    first = time.perf_counter() - started
    for _ in range(job["steps"] - 1):
        run()
    print(
        json.dumps(
            [
                torch.cuda.max_memory_allocated() if job["device"] == "cuda" else peak_resident(),
                first,
            ]
        )
    )
