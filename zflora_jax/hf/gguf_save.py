"""Exports: base or fused models as GGUF files, which llama.cpp runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.architecture import count_base
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import nearest, require
from zflora_jax.core.model import Model
from zflora_jax.hf.card import base_name, project_version
from zflora_jax.hf.directory import folder_beside, put_in_place
from zflora_jax.hf.gguf_form import GGUFForm, gguf_form
from zflora_jax.hf.gguf_keep import keep_form, plan_kept
from zflora_jax.hf.gguf_reader import GGUFFile
from zflora_jax.hf.gguf_types import KEEP, QUANTS, TYPES, Planned, Quant, plan_tensor, types_report
from zflora_jax.hf.gguf_vocabulary import check_tokenizer, tokenizer_metadata
from zflora_jax.parallel.distributed import from_process_0, on_main
from zflora_jax.reporting.files import local_path

MARK = "zflora.version"  # a metadata key that files of this project alone have


def save_gguf(
    out: str | os.PathLike[str],
    model: Model,
    quant: str = "q8_0",
    *,
    eps_z: float | None = None,
) -> dict[str, Any]:
    """Write a base or fused model as a GGUF file.

    The residual stream, the MLP units and the dims of widened heads get channels of zeros up to
    multiples of 32, because llama.cpp quantises rows in blocks of 32; the function stays the same.
    The file appears whole or not at all. An existing one is replaced only if this project wrote it.
    Processes that share the model call this together: they gather one tensor of one layer at a
    time, and process 0 writes it.

    Args:
      out: the file to write, *.gguf.
      model: of a family that llama.cpp has, not packed. Where it came from a .gguf file, that
        file's tokenizer is copied as it is.
      quant: "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1" or "q4_k_m": the type of the matrices.
        Norms and biases are float32 in all of them. "keep": the blocks that the model has, byte
        for byte, where it was loaded with `quantize="keep"` (or quantised as q8_0, q4_0 or q4_1),
        and a fused adapter's beside them; matrices that it has as numbers get the type of the file
        that it came from if that is F32, F16, BF16 or Q8_0, else Q8_0.
      eps_z: scale of the stored residual state, as `save_hf` takes it. None: chosen from the
        weights for the rounding of float32 ("f32"), float16 ("f16") or bfloat16.

    Returns:
      {"path", "quant", "types", "fallback", "widths", "filled with zeros", "tokenizer",
      "parameters", "bytes"}; "fallback" names the tensors whose rows are no multiple of their
      type's block, and the types that they have instead. "numbers, not blocks" of "keep" names the
      matrices that the model does not have as blocks, their types, and those of the base's file
      where they are others. "eps_z" where there is a state to scale, "context" where a sliding
      window limits it, "architecture" where it is not the family's own.

    Raises:
      ConfigError: a setting is wrong, or a GGUF file cannot hold the model or its tokenizer.
      CheckpointError: a value is not finite in its type, the file must not be replaced, or it
        cannot be written.
    """
    target = on_main(lambda: check_target(out, quant)) or Path(out)
    form, tensors, own, file_type = _planned(model, quant, eps_z)
    tokenizer, origin = on_main(lambda: tokenizer_metadata(model)) or ({}, "")
    report = {"path": str(target), "quant": quant} | types_report(tensors) | own | form.report()
    report |= {"tokenizer": origin, "parameters": count_base(form.config)}
    with contextlib.ExitStack() as stack:
        # None in all processes but the one that writes; they help to gather the tensors.
        temporary = on_main(lambda: stack.enter_context(whole_file(target)))
        metadata = _metadata(model, form, file_type) | tokenizer
        _write(temporary, form, model, tensors, metadata)
        on_main(lambda: None if temporary is None else check_tokenizer(temporary, model))
        on_main(stack.close)  # now it is in its place
    size = on_main(lambda: target.stat().st_size)
    return from_process_0(report | {"bytes": size})


def check_target(out: str | os.PathLike[str], quant: str) -> Path:
    """Check what can be checked before there is a model.

    Args:
      out: as for `save_gguf`.
      quant: as for `save_gguf`.

    Returns:
      The absolute path of the file.

    Raises:
      ConfigError: `out` is a URL or no *.gguf, or there is no such `quant`.
      CheckpointError: there is a file or directory that must not be replaced.
    """
    require(quant in TYPES, f"quant={quant!r}: {nearest(quant, TYPES)}.")
    return check_path(out)


def check_path(out: str | os.PathLike[str]) -> Path:
    """`check_target` of any GGUF file; args, result and errors are its."""
    target = local_path(out, "out").expanduser().absolute()
    require(
        target.suffix == ".gguf",
        f"out={os.fspath(out)!r}: the name of a GGUF file ends in .gguf.",
    )
    _refuse_foreign(target)
    return target


def _planned(
    model: Model, quant: str, eps_z: float | None
) -> tuple[GGUFForm, list[Planned], dict[str, Any], str]:
    """The form of the file, its tensors, what a quantisation alone reports, the file's type."""
    if quant == KEEP:
        kept = keep_form(model, eps_z)
        return kept, *plan_kept(kept, model)
    row = QUANTS[quant]
    form = gguf_form(model, row.dtype, eps_z)
    return form, _plan(form, row), {}, row.file_type


def _plan(form: GGUFForm, quant: Quant) -> list[Planned]:
    shapes = form.shapes | {name: x.shape for name, x in form.rope_divisors.items()}
    layers, tied = form.config.num_layers, form.config.tie_word_embeddings
    return [
        plan_tensor(name, shape, quant, layers=layers, tied=tied) for name, shape in shapes.items()
    ]


def _metadata(model: Model, form: GGUFForm, file_type: str) -> dict[str, Any]:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    adapter = None if model.adapter is None else model.adapter.method
    name = base_name(model) or form.config.traits.title
    return {
        "general.type": "model",
        "general.name": name if adapter is None else f"{name} {adapter}",
        "general.file_type": int(LlamaFileType[file_type]),
        "general.quantization_version": GGML_QUANT_VERSION,
        MARK: project_version(),
        **({} if adapter is None else {"zflora.method": adapter}),
        **form.metadata(),
    }


def _write(
    path: Path | None,
    form: GGUFForm,
    model: Model,
    tensors: list[Planned],
    metadata: dict[str, Any],
) -> None:
    """Write the file tensor by tensor; nothing where `path` is None."""
    from gguf import GGUFWriter

    numbers = _numbers(form, model)
    if path is None:
        # They stop at what process 0 stops at: otherwise they would wait for it.
        for tensor, (_, array) in zip(tensors, numbers, strict=True):
            tensor.check(array)
        return
    writer = GGUFWriter(path, form.architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for tensor in tensors:
        shape = tensor.byte_shape
        size = int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, (_, array) in zip(tensors, numbers, strict=True):
            tensor.check(array)
            writer.write_tensor_data(tensor.encode(array))
    finally:
        writer.close()


def _numbers(form: GGUFForm, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    yield from form.tensors(model)
    yield from form.rope_divisors.items()


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add a metadata key, of the kind that llama.cpp expects for a value like this.

    Args:
      writer: a `gguf.GGUFWriter`.
      key: of the metadata.
      value: bool, int, float, str or a list of one of them.
    """
    from gguf import GGUFValueType

    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    if not isinstance(value, list):
        writer.add_key_value(key, value, kinds[type(value)])
    elif value:  # the format has no empty arrays
        items = kinds | {int: GGUFValueType.INT32}
        writer.add_key_value(key, value, GGUFValueType.ARRAY, items[type(value[0])])


# --- the file -------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Write a file in one step: the block writes a temporary one beside `target`, which takes its
    place if the block succeeds, and is removed if not.

    Args:
      target: that `check_path` accepts.

    Yields:
      The temporary file's path.

    Raises:
      CheckpointError: the file must not be replaced or cannot be written.
    """
    with folder_beside(target) as folder:
        yield folder / target.name
        _refuse_foreign(target)
        put_in_place(folder / target.name, target)


def _refuse_foreign(target: Path) -> None:
    """CheckpointError for an existing path that is no file of this project."""
    if not target.exists():
        return
    advice = "It is left as it is: choose another path, or move it away."
    try:
        ours = target.is_file() and GGUFFile(target).get(MARK) is not None
    except CheckpointError:
        ours = False
    if not ours:
        raise CheckpointError(
            f"{target} exists and is no GGUF file that this project wrote. {advice}"
        )
