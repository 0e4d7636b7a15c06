"""Exports: base or fused models as GGUF files, which llama.cpp runs.

llama.cpp quantises rows in blocks of 32 weights, so all streams get channels of zeros up to a
multiple of 32. quant="keep" writes the base's blocks with the same bytes: a fused adapter's inputs
append blocks to each row, its outputs append rows.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax import __version__
from zflora_jax.core import trees
from zflora_jax.core.architecture import KERNELS, count_base
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.families import FAMILIES
from zflora_jax.core.fields import require, require_in
from zflora_jax.core.model import Model, require_there
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.directory import folder_beside, fsync
from zflora_jax.hf.gguf.file import (
    ATTENTION_FACTOR,
    KEEP,
    KEPT,
    ORIGINAL_CONTEXT,
    QUANTS,
    ROPE_DIVISORS,
    SETTINGS,
    SIZE,
    GGUFFile,
    Tensor,
    gguf_table,
    paired,
)
from zflora_jax.hf.gguf.tokenizer import tokenizer_metadata
from zflora_jax.hf.hub import base_name, locate
from zflora_jax.hf.keys import Place, hf_table
from zflora_jax.hf.stock import (
    StockForm,
    module_of,
    native_leaf,
    round_up,
    scales_state,
    stock_form,
    widths_report,
)
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.parallel.distributed import from_process_0, on_main
from zflora_jax.reporting.files import local_path

MARK = "zflora.version"  # a metadata key that only files of this project have
# Types that float matrices keep from the base's file; others, such as Q6_K, become Q8_0.
_SAME = ("F32", "F16", "BF16", "Q8_0")
_TABLES = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class GGUFForm:
    """The form of a model in a GGUF file."""

    model_config: LlamaConfig  # native
    stock: StockForm  # of the model with padded heads and MLP units
    keep: bool = False  # whether quantised leaves are written with their codes and scales

    @property
    def config(self) -> LlamaConfig:
        """The config with the widths of the file."""
        return self.stock.config

    @property
    def architecture(self) -> str:
        """llama.cpp's architecture. Its qwen2 has no RoPE divisors and needs heads as wide as the
        residual stream; its llama is otherwise the same and reads biases.
        """
        config, wide = self.config, self.config.num_heads * self.config.head_dim
        other = self.rope_divisors or wide != config.hidden_size
        return "llama" if config.traits.gguf_as_llama and other else config.traits.gguf

    @property
    def rope_divisors(self) -> dict[str, np.ndarray]:
        """The divisors of llama.cpp's angles, for RoPE of a part of a head or scaled; else none."""
        native = self.stock.native
        if native.base_head_dim is None and native.rope_scaling is None:
            return {}
        return {ROPE_DIVISORS: self.stock.rope_divisors.astype(np.float32)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, in the order of `tensors`."""
        shapes = {name: place.hf_shape for name, place in gguf_table(self.config).items()}
        return shapes | {name: x.shape for name, x in self.rope_divisors.items()}

    def tensors(self, model: Model) -> Iterator[tuple[str, Any]]:
        """Yields names and float32 arrays or codes. Processes go through them together."""
        for name, stored in gguf_table(self.config).items():
            place = hf_table(model.config)[stored.tensor]
            leaf = native_leaf(model, place) if self.keep else None
            if isinstance(leaf, QuantizedArray):
                yield name, self._codes(leaf, stored)
            else:
                rows = self.stock.tensor(model, stored.tensor)
                yield name, self._in_order(module_of(stored), rows)
        yield from self.rope_divisors.items()

    def _codes(self, leaf: QuantizedArray, stored: Place) -> QuantizedArray:
        """Codes [out, in] and float32 scales [out, in / 32] of a leaf. A zero code in the padding
        of a block need not mean the value zero, because the channel that it reads is zero.
        """
        module, native = module_of(stored), self.stock.native
        reads, writes = KERNELS.get(module, ("", ""))

        def in_file(part: np.ndarray, dtype: Any, weights: int) -> np.ndarray:
            """Codes, or scales or minima of several weights each, padded and in GGUF's layout."""
            shape = list(stored.shape)
            shape[leaf.axis] //= weights
            padding = [(0, b - a) for a, b in zip(part.shape, shape, strict=True)]
            part = np.pad(np.asarray(part).astype(dtype), padding)
            if weights > 1 and writes == "residual":
                part[..., native.base_width :] *= np.float32(self.stock.eps_z)
            if weights > 1 and reads == "residual":
                part[native.base_width // SIZE :] /= np.float32(self.stock.eps_z)
            if self.stock.rotated(module):
                part = part[..., self.stock.head_order]
            if stored.in_axes is not None:
                part = part.reshape(-1, stored.hf_shape[0]).T
            return self._in_order(module, part)

        codes = partial(in_file, dtype=np.int8, weights=1)
        scales = partial(in_file, dtype=np.float32, weights=SIZE)
        return leaf.map(codes, scales, writes=0)

    def _in_order(self, module: str, rows: np.ndarray) -> np.ndarray:
        return paired(rows, self.config, self.architecture, module)

    def metadata(self) -> dict[str, Any]:
        """The keys that describe the architecture; int stands for uint32, float for float32."""
        config, native = self.config, self.stock.native
        values = {key: getattr(config, field) for key, field in SETTINGS.items()} | {
            "vocab_size": config.vocab_size,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
        }
        if self.stock.scores_in_rope and native.base_head_dim is not None:
            values[ATTENTION_FACTOR] = math.sqrt(self.stock.wider)
        if native.rope_scaling is not None:
            values[ORIGINAL_CONTEXT] = native.rope_scaling.original_max_position_embeddings
        return {f"{self.architecture}.{key}": value for key, value in values.items()}

    def report(self) -> dict[str, Any]:
        """Widths of the file, its padding, and settings that the file cannot express."""
        config, native = self.config, self.model_config
        report: dict[str, Any] = {**widths_report(native, config)}
        if scales_state(native):
            report["eps_z"] = self.stock.eps_z
        if (context := config.max_position_embeddings) < native.max_position_embeddings:
            report["context"] = (
                f"{context} of {native.max_position_embeddings}: the sliding window, which"
                " llama.cpp does not apply"
            )
        return report


def gguf_form(model: Model, dtype: str, eps_z: float | None = None) -> GGUFForm:
    """The form of a model in a GGUF file; dtype and eps_z are those of `stock_form`. ConfigError if
    the model is packed, llama.cpp cannot hold it, or eps_z cannot be used.
    """
    eps_z = stock_form(model, dtype, eps_z).eps_z
    config = model.config
    require(
        config.base_head_dim is None or config.traits.gguf_wide_heads,
        f"heads wider than the base's need RoPE divisors, which llama.cpp does not read for family"
        f" {config.family!r}. Fuse a method that does not widen them (zflora-minimal, lora, ffa,"
        " full), or export a Hugging Face directory (--format hf).",
    )
    takes = [name for name, f in FAMILIES.items() if f.gguf == "llama" or f.gguf_as_llama]
    advice = "Export a Hugging Face directory (--format hf)."
    require(
        config.rope_scaling is None or config.family in takes,
        f"Llama-3's RoPE scaling needs RoPE divisors, which llama.cpp reads for"
        f" {', '.join(takes)}, not for {config.family}. {advice}",
    )
    known = tuple(range(3, config.num_layers, 4)) if config.traits.nope else ()
    require(
        config.nope_layers == known,
        f"nope_layers={config.nope_layers}: llama.cpp assumes {known} of {config.num_layers} layers"
        f" without RoPE in {config.family}, and a file cannot change that. {advice}",
    )
    native = config.replace(intermediate_size=round_up(config.intermediate_size, SIZE))
    if config.sliding_window is not None:  # llama.cpp applies none here
        context = min(config.max_position_embeddings, config.sliding_window)
        native = native.replace(max_position_embeddings=context)
    if config.hidden_size % SIZE and config.base_hidden_size is None:
        native = native.replace(base_hidden_size=config.hidden_size)  # which stock form pads
    if config.base_head_dim is not None:
        native = native.replace(head_dim=round_up(config.head_dim, SIZE))
    return GGUFForm(config, StockForm(native, eps_z, SIZE))


# --- keep -----------------------------------------------------------------------------------------


def kept_blocks_form(model: Model, eps_z: float | None = None) -> GGUFForm:
    """The form that keeps blocks. eps_z None: chosen for float32's rounding, or the next larger one
    that keeps the scales of the state's blocks in float16's range.
    """
    require_blocks(model)
    form = gguf_form(model, "float32", eps_z)
    chosen = form.stock.eps_z
    while chosen < 1 and not _in_range(model, chosen):
        chosen *= 2
    require(
        eps_z in (None, chosen),
        f"eps_z={eps_z}: scales of the state's blocks leave the range of float16, which GGUF's"
        f" blocks have. Give {chosen} or more, or leave it out.",
    )
    return replace(form, stock=replace(form.stock, eps_z=chosen, scores_in_rope=True), keep=True)


def require_blocks(model: Model) -> None:
    """Raises ConfigError for a model without quantised leaves, or with other types than GGUF's."""
    leaves = trees.flatten(model.params).items()
    kinds = {leaf.kind: name for name, leaf in leaves if isinstance(leaf, QuantizedArray)}
    foreign = sorted(kinds.keys() - set(KEPT))
    require(
        bool(kinds) and not foreign,
        f"quant='keep' writes a model's own blocks of {', '.join(KEPT)}, and this one has"
        f" {', '.join(f'{kind} ({kinds[kind]})' for kind in foreign) or 'only floats'}. Load its"
        " base with load_model(FILE.gguf, quantize='keep') and train with quantize.kernels=keep and"
        " quantize.embedding=keep, or choose another quant, such as q8_0.",
    )


def _in_range(model: Model, eps_z: float) -> bool:
    """True if float16 holds the scales of the state's blocks, times or over eps_z. The error of any
    scale, e.g. a subnormal one, must not exceed float16's rounding of the output's largest.
    """
    base = model.config.base_width
    for name, leaf in trees.flatten(model.params).items():
        reads, writes = KERNELS.get(name.split("/")[-2], ("", ""))
        if not isinstance(leaf, QuantizedArray) or "residual" not in (reads, writes):
            continue
        at: tuple[Any, ...] = (..., slice(base, None))
        scale = np.float32(eps_z)
        if reads == "residual":
            at = (..., slice(base // SIZE, None), *(slice(None),) * leaf.writes)
            scale = np.float32(1 / eps_z)
        inputs = tuple(range(int(name.startswith("layers/")), leaf.ndim - 1))
        for part in (leaf.scales, leaf.mins):
            if part is None:
                continue
            state = trees.on_host(part[at]).astype(np.float32) * scale
            largest = np.abs(state).max(inputs, initial=0.0, keepdims=True)
            with np.errstate(over="ignore", invalid="ignore"):
                error = np.abs(state.astype(np.float16) - state)
            if not (error <= 2.0**-11 * largest).all():
                return False
    return True


# --- the file -------------------------------------------------------------------------------------


def save_gguf(
    out: str | os.PathLike[str], model: Model, quant: str = "q8_0", *, eps_z: float | None = None
) -> dict[str, Any]:
    """Writes a base or fused model as a GGUF file.

    The file appears whole or not at all, and replaces only a file of this project. Processes that
    share the model call this together: they gather one tensor of one layer at a time, and process
    0 writes it.

    Args:
      out: The file to write, *.gguf.
      model: A model of a family that llama.cpp has, not packed.
      quant: Type of the matrices: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1". "keep": the
        blocks of a model that was loaded with `quantize="keep"` (or quantised as q8_0, q4_0 or
        q4_1), byte for byte, and a fused adapter's next to them. Its float matrices keep the type
        of the source file if that is F32, F16, BF16 or Q8_0; others become Q8_0.
      eps_z: Scale of the stored residual state, see `save_hf`. None: chosen from the weights for
        the rounding of float32 ("f32", "keep"), float16 ("f16") or bfloat16.

    Returns:
      {"path", "quant", "types", "fallback", "widths", "filled with zeros", "tokenizer",
      "parameters", "bytes"}. "fallback" names the tensors with another type than `quant` or, with
      "keep", than in the base's file. There is also "eps_z" if there is a state to scale, and
      "context" if a sliding window limits it.

    Raises:
      ConfigError: A setting is wrong, or a GGUF file cannot hold the model or its tokenizer.
      CheckpointError: A value is not finite in its type, the file must not be replaced, or it
        cannot be written.
    """
    require_there(model.params)
    target = on_main(lambda: gguf_target(out, quant)) or Path(out)
    source = on_main(lambda: _source_file(model))
    types = {name: t.type.name for name, t in source.tensors.items()} if source else {}
    keep = quant == KEEP
    form = kept_blocks_form(model, eps_z) if keep else gguf_form(model, QUANTS[quant].dtype, eps_z)
    tensors, file_type, report = _plan(form, model, quant, from_process_0(types))
    tokenizer, origin = on_main(lambda: tokenizer_metadata(model, source)) or ({}, "")
    more = {"tokenizer": origin, "parameters": count_base(form.config)}
    whole = {"path": str(target), "quant": quant} | report | form.report() | more
    metadata = _metadata(model, form, file_type) | tokenizer
    with contextlib.ExitStack() as stack:
        # None in all processes but the one that writes; they help to gather the tensors.
        writer = on_main(lambda: stack.enter_context(_writer(target, form, metadata, tensors)))
        for tensor, (_, values) in zip(tensors, form.tensors(model), strict=True):
            data = tensor.encode(values)  # in all, so that all raise the errors of process 0
            if writer is not None:
                writer.write_tensor_data(data)
        on_main(stack.close)  # now it is in its place
    size = on_main(lambda: target.stat().st_size)
    return from_process_0(whole | {"bytes": size})


def gguf_target(out: str | os.PathLike[str], quant: str) -> Path:
    """The absolute path of the file, after checks of `save_gguf`'s arguments without the model."""
    require_in(
        (*QUANTS, KEEP),
        quant,
        f"quant={quant!r}",
        " For other types, such as q4_k_m, write an f16 file (--quant f16) and quantise it with"
        " llama.cpp: `llama-quantize FILE.gguf OUT.gguf Q4_K_M`.",
    )
    target = local_path(out, "out").expanduser().absolute()
    require(
        target.suffix == ".gguf", f"out={os.fspath(out)!r}: the name of a GGUF file ends in .gguf."
    )
    _refuse_foreign(target)
    return target


def _source_file(model: Model) -> GGUFFile | None:
    """The GGUF file that a model came from; None if there is none, or it is gone."""
    if model.source is None:
        return None
    try:
        path = locate(model.source)
        return GGUFFile(path) if path.suffix == ".gguf" else None
    except CheckpointError:  # moved away, or the hub cannot be reached
        return None


def _plan(
    form: GGUFForm, model: Model, quant: str, before: Mapping[str, str]
) -> tuple[list[Tensor], str, dict[str, str]]:
    """(The tensors in the order of the file, F16 if no block divides the rows, as llama-quantize
    does; the name of the file's `gguf.LlamaFileType`; "types" and "fallback" of the report).
    before: Types in the file that the model came from, by name.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    flat, places = trees.flatten(model.params), hf_table(model.config)
    table = gguf_table(form.config)
    tensors, fallback = list[Tensor](), dict[str, None]()
    for name, shape in form.shapes.items():
        place = table.get(name)
        leaf: Any = None if place is None else flat[places[place.tensor].leaf]
        if len(shape) == 1:
            wanted = now = "F32"  # norms, biases and RoPE divisors, which llama.cpp reads as floats
        elif not form.keep:
            row = QUANTS[quant]
            wanted = now = row.table if name in _TABLES else row.matrix
        elif isinstance(leaf, QuantizedArray):
            wanted = now = leaf.kind.upper()
        else:
            wanted = before.get(name, "Q8_0")
            now = wanted if wanted in _SAME else "Q8_0"
        if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[now]][0]:
            now = "F16"
        tensors.append(Tensor(name, shape, GGMLQuantizationType[now]))
        if now != wanted:
            fallback[f"{name.split('.')[-2]} as {now}, not {wanted}"] = None
    counts = sorted(Counter(tensor.type.name for tensor in tensors).items())
    types = ", ".join(f"{count} {name}" for name, count in counts)
    matrices = Counter(tensor.type.name for tensor in tensors if len(tensor.shape) > 1)
    [(most, _)] = matrices.most_common(1)
    file_type = "ALL_F32" if most == "F32" else f"MOSTLY_{most}"
    return tensors, file_type, {"types": types, "fallback": ", ".join(fallback) or "none"}


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
        MARK: __version__,
        **form.metadata(),
    }


@contextlib.contextmanager
def _writer(
    target: Path, form: GGUFForm, metadata: dict[str, Any], tensors: list[Tensor]
) -> Iterator[Any]:
    """Yields a writer whose file has its header, and replaces `target` if the block succeeds."""
    from gguf import GGUFWriter

    with folder_beside(target) as folder:
        writer = GGUFWriter(folder / target.name, form.architecture)
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
            writer.add_tensor_info(
                tensor.name, shape, np.dtype(np.uint8), math.prod(shape), tensor.type
            )
        with contextlib.closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            yield writer
        _refuse_foreign(target)
        fsync(folder / target.name)
        os.replace(folder / target.name, target)
        fsync(target.parent)


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
