"""One training step, in this process or in one of its own, and the rate of matrix products."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from zflora_jax.adapters.init import init_adapters
from zflora_jax.bench import baselines
from zflora_jax.bench.case import OPTIM, Case, peak_resident
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.model import Model
from zflora_jax.core.presets import PRESETS, preset
from zflora_jax.hf.load import load_model
from zflora_jax.nn.llama import random_model
from zflora_jax.training.objective import Batch
from zflora_jax.training.trainer import StepFn, TrainState, init_state, make_train_step

PEFT = "PEFT lora"


def load(case: Case) -> Model:
    """Load the base model of a case as numbers of its dtype; a preset other than smollm2-135m has
    random weights.

    Args:
      case: model and dtype are read.
    """
    if case.model not in PRESETS or case.model == "smollm2-135m":
        return load_model(case.model, dtype=case.dtype)
    model = random_model(preset(case.model).replace(dtype=case.dtype), jax.random.key(0))
    return Model(model.config, jax.tree.map(lambda leaf: leaf.astype(case.dtype), model.params))


def training_case(case: Case, model: Model, method: str) -> tuple[StepFn, TrainState, Batch]:
    """The jitted step of a case, its first state and the batch that it is measured on.

    Args:
      case: rank, batch and mask.
      model: the base, stored as the case says.
      method: of `METHODS`.
    """
    adapter = AdapterConfig(method, rank=case.rank)
    state = init_state(init_adapters(jax.random.key(0), model, adapter), OPTIM, 1000)
    batch = jax.device_put(case.batch_arrays(model.config.vocab_size))
    return make_train_step(model.config, adapter, OPTIM, 1000), state, batch


def our_step(case: Case, model: Model, method: str) -> Callable[[], float]:
    """A function that trains one step and returns its loss.

    Args:
      case: rank, batch and mask.
      model: the base, stored as the case says.
      method: of `METHODS`.
    """
    step, state, batch = training_case(case, model, method)

    def run() -> float:
        nonlocal state
        state, metrics = step(model.params, state, batch)
        return float(metrics["loss"])

    return run


def alone(case: Case, label: str, directory: str, steps: int = 3) -> tuple[float, float]:
    """Measure a process that trains and does nothing else.

    Args:
      case: the set-up.
      label: a method, or `PEFT`.
      directory: the saved base.
      steps: training steps.

    Returns:
      (Peak memory in bytes, seconds until the first step is finished). Memory is resident memory,
      on a GPU the device's.

    Raises:
      RuntimeError: the process failed; the message says why.
    """
    module = "peft" if label == PEFT else "training_step"
    device = baselines.device() if label == PEFT else ""
    job = {
        "case": dataclasses.asdict(case),
        "label": label,
        "directory": directory,
        "steps": steps,
        "device": device,
    }
    command = [sys.executable, "-c", f"from zflora_jax.bench import {module}; {module}.main()"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(
            f"{label} ended with {done.returncode} in a process of its own: {_reason(done.stderr)}"
        )
    peak, first = json.loads(done.stdout.splitlines()[-1])
    return peak, first


def _reason(output: str) -> str:
    """The line of a traceback that says what went wrong, or else the last line."""
    lines = output.strip().splitlines() or ["it printed nothing"]
    said = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return [*lines, *said][-1]


def main() -> None:
    """As `peft.main`, for a method of this project."""
    job = json.load(sys.stdin)
    case = Case(**job["case"])
    jax.devices()
    started = time.perf_counter()
    how = None if case.quantize == "none" else case.quantize
    base = load_model(job["directory"], dtype=case.dtype, quantize=how)
    run = our_step(case, base, job["label"])
    run()
    first = time.perf_counter() - started
    for _ in range(job["steps"] - 1):
        run()
    peak = peak_resident()
    if jax.default_backend() == "gpu":  # there the device's memory counts
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", peak)
    print(json.dumps([peak, first]))


def matmul_rate(dtype: str, repeats: int = 3) -> float:
    """Measure FLOP/s of products of square matrices on the default device.

    Args:
      dtype: of the matrices.
      repeats: the best of so many.
    """
    # On an accelerator one product takes no longer than its dispatch, so 20 are chained.
    size, count = (2048, 1) if jax.default_backend() == "cpu" else (4096, 20)
    x, best = jnp.full((size, size), 1 / size, jnp.dtype(dtype)), 0.0

    @jax.jit
    def chain(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, y: y @ x, x)

    jax.block_until_ready(chain(x))
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(chain(x))
        best = max(best, 2 * count * size**3 / (time.perf_counter() - start))
    return best
