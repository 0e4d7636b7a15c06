"""Exports: base or fused models as LiteRT files, which run on phones and small computers.

The model is written as a Hugging Face directory, and litert-torch converts that in a process of its
own, because it needs torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import nearest, require
from zflora_jax.core.model import Model
from zflora_jax.hf.compressed import compressed_form
from zflora_jax.hf.directory import folder_beside, put_in_place
from zflora_jax.hf.save import save_hf
from zflora_jax.hf.state_scale import check_eps_z, choose_eps_z, scales_state
from zflora_jax.hf.stock import stock_form
from zflora_jax.nn.quantize_model import dequantize_model, is_quantized
from zflora_jax.parallel.distributed import from_process_0, on_main
from zflora_jax.reporting.files import local_path

SUFFIXES = (".litertlm", ".tflite")
CONTEXT = 1024  # tokens; every token of the answer pays for the whole cache, used or not
PREFILL = 128  # tokens that a prompt is read in at once
PACKAGES = ("litert_torch", "ai_edge_litert", "tensorflow")  # the extra `litert`, as imported
INSTALL = "pip install 'zflora-jax[litert]'"


@dataclass(frozen=True)
class Quant:
    """A way to store the matrices.

    Attributes:
      recipe: its name in ai-edge-quantizer; None: numbers.
      text: for messages and reports.
    """

    recipe: str | None
    text: str


QUANTS = {
    "f32": Quant(None, "numbers in float32"),
    "int8": Quant(
        "dynamic_wi8_afp32",
        "8 bits, one scale for each output channel; activations rounded to 8 bits, token by token",
    ),
}


def save_litert(
    out: str | os.PathLike[str],
    model: Model,
    quant: str = "int8",
    *,
    context: int | None = None,
    eps_z: float | None = None,
    python: str | None = None,
) -> dict[str, Any]:
    """Write a base or fused model as a LiteRT file: the graph of its family's stock class, with a
    signature that reads a prompt, one that takes a single token, and a cache of keys and values.

    The file appears whole or not at all, and replaces none. Beside it there has to be room for the
    model in float32, twice. Processes that share the model call this together; process 0 writes.

    Args:
      out: the file to write. *.litertlm has the tokenizer and the chat template too, for LiteRT-LM;
        *.tflite is the model alone.
      model: with a tokenizer, not packed.
      quant: "f32" or "int8", see `QUANTS`.
      context: how many tokens the cache holds, prompt and answer together. None: 1024, or as many
        as the model is made for if that is less.
      eps_z: scale of the stored residual state, as `save_hf` takes it. None: chosen from the
        weights for the rounding of `quant`, see `int8_eps_z`.
      python: of the environment that has litert-torch; None: this one.

    Returns:
      {"path", "quant", "parameters", "widths", "context", "bytes"}; "eps_z" where there is a state.

    Raises:
      ConfigError: a setting is wrong, or the packages of the extra `litert` are missing.
      CheckpointError: the file must not be replaced, a value is not finite, or litert-torch cannot
        convert the model; the message has its last lines.
    """
    target = on_main(lambda: check_target(out, quant, context, python)) or Path(out)
    most = model.config.max_position_embeddings
    context = min(CONTEXT, most) if context is None else context
    require(context <= most, f"context={context}: this model is made for at most {most} tokens.")
    require(
        model.tokenizer is not None,
        "this model has no tokenizer, and litert-torch converts none without. Set model.tokenizer.",
    )
    if scales_state(model.config):
        eps_z = _eps_z(model, quant, eps_z)
    elif eps_z is not None:
        check_eps_z(model, eps_z)
    with contextlib.ExitStack() as stack:
        made = on_main(lambda: str(stack.enter_context(folder_beside(target))))
        folder = Path(from_process_0(made))
        report = save_hf(folder / "hf", model, dtype="float32", eps_z=eps_z)
        on_main(lambda: _convert(folder, target, quant, context, python or sys.executable))
        on_main(lambda: _put(folder / target.name, target))
    size = on_main(lambda: target.stat().st_size)
    told: dict[str, Any] = {key: report[key] for key in ("parameters", "eps_z") if key in report}
    told["widths"] = report["widths"].split(";")[0]  # behind it: what GGUF files need
    return from_process_0(
        {"path": str(target), "quant": f"{quant}: {QUANTS[quant].text}"}
        | told
        | {"context": context, "bytes": size}
    )


def check_target(
    out: str | os.PathLike[str],
    quant: str,
    context: int | None = None,
    python: str | None = None,
) -> Path:
    """Check what can be checked before there is a model.

    Args:
      out: as for `save_litert`, and so are the others.

    Returns:
      The absolute path of the file.

    Raises:
      ConfigError: a setting is wrong, or a package is missing.
      CheckpointError: there is something under that name.
    """
    require(
        quant in QUANTS,
        f"quant={quant!r} of a LiteRT file: {nearest(quant, QUANTS)}. Widths such as 594, which no"
        " group of 32 divides, have no 4 bit form there; --format gguf has one.",
    )
    require(
        context is None or context >= 2,
        f"context={context}: must be at least 2, a prompt and an answer.",
    )
    target = local_path(out, "out").expanduser().absolute()
    require(
        target.suffix in SUFFIXES,
        f"out={os.fspath(out)!r}: the name of a LiteRT file ends in {' or '.join(SUFFIXES)}.",
    )
    _require_new(target)
    if python is None:
        require_packages()
    return target


def require_packages() -> None:
    """ConfigError where the packages of the extra `litert` are missing; imports none of them."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    require(
        not missing,
        f"LiteRT files need {', '.join(missing)}, which this environment lacks: {INSTALL}",
    )


def int8_eps_z(model: Model) -> float:
    """Choose eps_z for int8 with one scale for each output channel and each token.

    Rows that read the state are divided by eps_z, so a small one makes them the largest of their
    channel and coarsens the base's numbers. A large one disturbs the norms.

    Returns:
      The larger of two powers of two: the one that stores these rows with the smallest error on
      the base's own scales, and the largest that disturbs the logits less than bfloat16 does.
    """
    numbers = dequantize_model(model, "float32") if is_quantized(model) else model
    form = compressed_form(numbers, "int8", "float32", None)
    return max(form.stock.eps_z, choose_eps_z(numbers, "bfloat16"))


def _eps_z(model: Model, quant: str, eps_z: float | None) -> float:
    if eps_z is None and quant == "int8":
        return int8_eps_z(model)
    return stock_form(model, "float32", eps_z).eps_z


# --- the conversion and the file ------------------------------------------------------------------


def _convert(folder: Path, target: Path, quant: str, context: int, python: str) -> None:
    """Convert folder/hf into a file of the target's name in `folder`."""
    job = {
        "model": str(folder / "hf"),
        "folder": str(folder),
        "out": str(folder / target.name),
        "recipe": QUANTS[quant].recipe,
        "context": context,
        "prefill": min(PREFILL, context),
    }
    root = Path(__file__).resolve().parents[2]
    # litert-torch imports jax and tensorflow beside torch: it must not take the accelerator that
    # this process holds, nor look for anything on the hub.
    env = os.environ | {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, "-m", "zflora_jax.hf.litert_convert", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, errors="replace")
    if done.returncode or not (folder / target.name).is_file():
        lines = (done.stdout + done.stderr).strip().splitlines()[-12:]
        raise CheckpointError(
            f"{target} was not written: litert-torch cannot convert this model, or stopped with"
            f" exit status {done.returncode}. Its last lines:\n" + "\n".join(lines)
        )


def _put(made: Path, target: Path) -> None:
    _require_new(target)
    put_in_place(made, target)


def _require_new(target: Path) -> None:
    if target.exists():
        raise CheckpointError(
            f"{target} exists, and a LiteRT file replaces nothing. It is left as it is: choose"
            " another path, or move it away."
        )
