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
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.hf.card import base_name, project_version
from zflora_jax.hf.directory import folder_beside, put_in_place
from zflora_jax.hf.gguf.file import GGUFFile
from zflora_jax.hf.gguf.form import GGUFForm, gguf_form
from zflora_jax.hf.gguf.keep import keep_form, plan_kept
from zflora_jax.hf.gguf.tokenizer import tokenizer_metadata
from zflora_jax.hf.gguf.types import KEEP, QUANTS, Planned, check_quant, plan_tensor, types_report
from zflora_jax.hf.hub import locate
from zflora_jax.parallel.distributed import from_process_0, on_main
from zflora_jax.reporting.files import local_path

MARK = "zflora.version"  # a metadata key that only files of this project have


def save_gguf(
    out: str | os.PathLike[str],
    model: Model,
    quant: str = "q8_0",
    *,
    eps_z: float | None = None,
) -> dict[str, Any]:
    """Writes a base or fused model as a GGUF file.

    The residual stream, the MLP units and the dims of widened heads get channels of zeros up to
    multiples of 32, because llama.cpp quantises rows in blocks of 32; the function stays the same.
    The file appears whole or not at all. An existing one is replaced only if this project wrote it.
    Processes that share the model call this together: they gather one tensor of one layer at a
    time, and process 0 writes it.

    Args:
      out: The file to write, *.gguf.
      model: A model of a family that llama.cpp has, not packed. If it came from a .gguf file, that
        file's tokenizer is copied as it is.
      quant: Type of the matrices: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1" (llama-quantize
        makes other types from an f16 file). Norms and biases are always float32. "keep": the blocks
        of a model that was loaded with `quantize="keep"` (or quantised as q8_0, q4_0 or q4_1), byte
        for byte, and a fused adapter's next to them; its float matrices get the type of the file
        that it came from if that is F32, F16, BF16 or Q8_0, else Q8_0.
      eps_z: Scale of the stored residual state, as `save_hf` takes it. None: chosen from the
        weights for the rounding of float32 ("f32"), float16 ("f16") or bfloat16.

    Returns:
      {"path", "quant", "types", "fallback", "widths", "filled with zeros", "tokenizer",
      "parameters", "bytes"}; "fallback" names the tensors whose rows no block of their type
      divides, and the types that they have instead. "not kept" of "keep" names the float matrices
      with their types, and with those of the base's file if these differ. "eps_z" if there is a
      state to scale, "context" if a sliding window limits it, "architecture" if it is not the
      family's own.

    Raises:
      ConfigError: A setting is wrong, or a GGUF file cannot hold the model or its tokenizer.
      CheckpointError: A value is not finite in its type, the file must not be replaced, or it
        cannot be written.
    """
    target = on_main(lambda: check_target(out, quant)) or Path(out)
    source, kept = on_main(lambda: _source_file(model)), dict[str, str]()
    if quant == KEEP:
        form: GGUFForm = (keeping := keep_form(model, eps_z))
        types = {n: t.type.name for n, t in source.tensors.items()} if source else {}
        tensors, kept, file_type = plan_kept(keeping, model, from_process_0(types))
    else:
        row = QUANTS[quant]
        form, file_type = gguf_form(model, row.dtype, eps_z), row.file_type
        tensors = [plan_tensor(name, shape, row) for name, shape in form.shapes.items()]
    tokenizer, origin = on_main(lambda: tokenizer_metadata(model, source)) or ({}, "")
    report = {"path": str(target), "quant": quant} | types_report(tensors) | kept | form.report()
    report |= {"tokenizer": origin, "parameters": count_base(form.config)}
    with contextlib.ExitStack() as stack:
        # None in all processes but the one that writes; they help to gather the tensors.
        temporary = on_main(lambda: stack.enter_context(_whole_file(target)))
        _write(temporary, form, model, tensors, _metadata(model, form, file_type) | tokenizer)
        on_main(stack.close)  # now it is in its place
    size = on_main(lambda: target.stat().st_size)
    return from_process_0(report | {"bytes": size})


def check_target(out: str | os.PathLike[str], quant: str) -> Path:
    """Checks the arguments of `save_gguf` before there is a model, and returns the absolute path of
    the file. Raises ConfigError and CheckpointError as `save_gguf` does.
    """
    check_quant(quant)
    target = local_path(out, "out").expanduser().absolute()
    require(
        target.suffix == ".gguf",
        f"out={os.fspath(out)!r}: the name of a GGUF file ends in .gguf.",
    )
    _refuse_foreign(target)
    return target


def _source_file(model: Model) -> GGUFFile | None:
    """The GGUF file that a model came from; None if there is none, or it is gone."""
    if model.source is None:
        return None
    try:
        path = locate(model.source)[0]
        return GGUFFile(path) if path.suffix == ".gguf" else None
    except CheckpointError:  # moved away, or the hub cannot be reached
        return None


def _metadata(model: Model, form: GGUFForm, file_type: str) -> dict[str, Any]:
    """The keys that describe the file and the architecture."""
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
    """Writes the file tensor by tensor; nothing where `path` is None."""
    from gguf import GGUFWriter

    arrays = zip(tensors, form.tensors(model), strict=True)
    if path is None:
        # They stop at what process 0 stops at: otherwise they would wait for it.
        for tensor, (_, array) in arrays:
            tensor.check(array)
        return
    writer = GGUFWriter(path, form.architecture)
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,  # of int32, where the items are integers
    }
    for key, value in metadata.items():
        add[type(value)](key, value)
    for tensor in tensors:
        shape = tensor.byte_shape
        size = int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, (_, array) in arrays:
            tensor.check(array)
            writer.write_tensor_data(tensor.encode(array))
    finally:
        writer.close()


@contextlib.contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """Yields the path of a temporary file next to `target`, which takes its place if the block
    succeeds, and is removed if not.
    """
    with folder_beside(target) as folder:
        yield folder / target.name
        _refuse_foreign(target)
        put_in_place(folder / target.name, target)


def _refuse_foreign(target: Path) -> None:
    """Raises CheckpointError for an existing path that is no file of this project."""
    if not target.exists():
        return
    try:
        ours = target.is_file() and GGUFFile(target).get(MARK) is not None
    except CheckpointError:
        ours = False
    if not ours:
        raise CheckpointError(
            f"{target} exists and is no GGUF file that this project wrote. It is left as it is:"
            " choose another path, or move it away."
        )
