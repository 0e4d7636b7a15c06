"""Exports: base or fused models as GGUF files, which llama.cpp runs.

llama.cpp quantises each row in blocks of 32 weights. So the residual stream, the MLP units and the
dims of widened heads get channels of zeros up to a multiple of 32, beyond those of stock form, and
the function stays the same.

quant="keep": a base that was loaded with its file's own blocks is written with the same bytes, and
the blocks of a fused adapter stand next to them: its inputs append blocks to each row, its outputs
append rows. Stock form leaves the base's blocks unchanged: norm gains and epsilon are floats, eps_z
goes into the scales of the state's blocks only, and the factor of widened heads' scores is a
metadata key of RoPE.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core import trees
from zflora_jax.core.architecture import KERNELS, count_base
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.families import FAMILIES, require_format
from zflora_jax.core.fields import nearest, require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.hf.directory import folder_beside, fsync
from zflora_jax.hf.gguf.file import (
    ATTENTION_FACTOR,
    KEEP,
    KEPT,
    QUANTS,
    ROPE_DIVISORS,
    SETTINGS,
    SIZE,
    GGUFFile,
    Planned,
    Quant,
    gguf_name,
    has_pairs,
    interleave,
    plan_tensor,
    tensor_module,
    types_report,
)
from zflora_jax.hf.gguf.tokenizer import tokenizer_metadata
from zflora_jax.hf.hub import base_name, locate, project_version
from zflora_jax.hf.keys import Place, hf_table
from zflora_jax.hf.stock import (
    StockForm,
    choose_eps_z,
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

log = logging.getLogger(__name__)

MARK = "zflora.version"  # a metadata key that only files of this project have


@dataclass(frozen=True)
class GGUFForm:
    """The form of a model in a GGUF file."""

    model_config: LlamaConfig  # native
    stock: StockForm  # of the model with padded heads and MLP units

    @property
    def config(self) -> LlamaConfig:
        """The config with the widths of the file."""
        return self.stock.config

    @property
    def architecture(self) -> str:
        """llama.cpp's architecture. Its qwen2 has no RoPE divisors and wants heads as wide as the
        residual stream; its llama takes biases and is the same otherwise.
        """
        config, native = self.config, self.stock.native
        plain = native.base_head_dim is None and native.rope_scaling is None
        if config.traits.gguf_as_llama and not (
            plain and config.num_heads * config.head_dim == config.hidden_size
        ):
            return "llama"
        return config.traits.gguf

    @functools.cached_property
    def table(self) -> dict[str, Place]:
        """Hugging Face name -> place with the widths of the file, in llama.cpp's usual order."""
        table = hf_table(self.config)
        last = [name for name in table if not name.startswith(("model.layers", "model.embed"))]
        return {name: table[name] for name in (*(n for n in table if n not in last), *last)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF name -> shape of every tensor, in the order of `tensors`."""
        shapes = {gguf_name(name): place.hf_shape for name, place in self.table.items()}
        return shapes | {name: x.shape for name, x in self.rope_divisors.items()}

    def tensors(self, model: Model) -> Iterator[tuple[str, Any]]:
        """Yields GGUF names and float32 tensors. Processes go through them together."""
        for name in self.table:
            yield gguf_name(name), self.tensor(model, name)
        yield from self.rope_divisors.items()

    def tensor(self, model: Model, name: str) -> Any:
        """One tensor, by its Hugging Face name."""
        return self.in_order(module_of(self.table[name]), self.stock.tensor(model, name))

    def in_order(self, module: str, rows: np.ndarray) -> np.ndarray:
        """The rows of a tensor in llama.cpp's order. module: Its name by `module_of`."""
        if not has_pairs(self.architecture) or module.removesuffix("_bias") not in ("q", "k"):
            return rows
        config = self.config
        return interleave(rows, config.num_heads if module[0] == "q" else config.num_kv_heads)

    @property
    def rope_divisors(self) -> dict[str, np.ndarray]:
        """The tensor that divides llama.cpp's angles, for RoPE of a part of a head or scaled as
        Llama 3's; none for plain RoPE.
        """
        native = self.stock.native
        if native.base_head_dim is None and native.rope_scaling is None:
            return {}
        return {ROPE_DIVISORS: self.stock.rope_divisors.astype(np.float32)}

    @property
    def context(self) -> int:
        """The context length; llama.cpp applies no sliding window here, so at most that window."""
        config = self.model_config
        return min(config.max_position_embeddings, config.sliding_window or 1 << 62)

    def metadata(self) -> dict[str, Any]:
        """The keys that describe the architecture; int stands for uint32, float for float32."""
        config = self.config.replace(max_position_embeddings=self.context)
        values = {key: getattr(config, field) for key, field in SETTINGS.items()} | {
            "vocab_size": config.vocab_size,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
        }
        if self.stock.scores_in_rope and self.stock.native.base_head_dim is not None:
            values[ATTENTION_FACTOR] = math.sqrt(self.stock.wider)
        return {f"{self.architecture}.{key}": value for key, value in values.items()}

    def report(self) -> dict[str, Any]:
        """Widths of the file, its padding, and settings that the file cannot express."""
        config, native = self.config, self.model_config
        report: dict[str, Any] = {**widths_report(native, config)}
        if self.architecture != config.traits.gguf:
            report["architecture"] = (
                f"{self.architecture} with biases: llama.cpp's {config.traits.gguf} does not take"
                " these widths"
            )
        if scales_state(native):
            report["eps_z"] = self.stock.eps_z
        if self.context < native.max_position_embeddings:
            report["context"] = (
                f"{self.context} of {native.max_position_embeddings}: the sliding window, which"
                " llama.cpp does not apply"
            )
        return report


def gguf_form(model: Model, dtype: str, eps_z: float | None = None) -> GGUFForm:
    """The form of a model in a GGUF file; dtype and eps_z are those of `stock_form`. ConfigError if
    the model is packed, llama.cpp cannot hold it, or eps_z cannot be used.
    """
    eps_z = stock_form(model, dtype, eps_z).eps_z
    config = model.config
    _require_readable(config)
    native = config.replace(intermediate_size=round_up(config.intermediate_size, SIZE))
    if config.hidden_size % SIZE and config.base_hidden_size is None:
        native = native.replace(base_hidden_size=config.hidden_size)  # which stock form pads
    if config.base_head_dim is not None:
        native = native.replace(head_dim=round_up(config.head_dim, SIZE))
    return GGUFForm(config, StockForm(native, eps_z, SIZE))


def _require_readable(config: LlamaConfig) -> None:
    """ConfigError if llama.cpp has no code for the model."""
    require_format(config.family, "gguf", config.base_head_dim is not None)
    rows = FAMILIES.items()
    takes = [name for name, row in rows if row.gguf == "llama" or row.gguf_as_llama]
    require(
        config.rope_scaling is None or config.family in takes,
        f"Llama-3's RoPE scaling needs RoPE divisors, which llama.cpp reads for"
        f" {', '.join(takes)}, not for {config.family}. Export a Hugging Face directory"
        " (--format hf).",
    )
    layers = config.num_layers
    known = tuple(range(3, layers, 4)) if config.traits.nope else ()
    require(
        config.nope_layers == known,
        f"nope_layers={config.nope_layers}: llama.cpp takes {known} of a {config.family} of"
        f" {layers} layers to be without RoPE, and a file cannot say otherwise. Export a Hugging"
        " Face directory (--format hf).",
    )


# --- keep -----------------------------------------------------------------------------------------

# Types of the base's file that float matrices get again; others, such as Q6_K, become Q8_0.
_SAME = ("F32", "F16", "BF16", "Q8_0")


@dataclass(frozen=True)
class KeptForm(GGUFForm):
    """The form of a model in a GGUF file, quantised leaves as codes and scales."""

    def tensor(self, model: Model, name: str) -> Any:
        """One tensor; of a quantised leaf codes [out, in] and float32 scales [out, in / 32]. A code
        of zero in the padding of a block need not stand for zero: the channel that it reads is.
        """
        place, stored = hf_table(model.config)[name], self.table[name]
        leaf = native_leaf(model, place)
        if not isinstance(leaf, QuantizedArray):
            return super().tensor(model, name)
        module, native = module_of(place), self.stock.native
        reads, writes = KERNELS.get(module, ("", ""))
        eps_z = np.float32(self.stock.eps_z)

        def in_file(part: np.ndarray | None, dtype: Any, weights: int) -> Any:
            """Codes, or scales or minima of several weights each, padded and in GGUF's layout."""
            if part is None:
                return None
            shape = list(stored.shape)
            shape[leaf.axis] //= weights
            padding = [(0, b - a) for a, b in zip(part.shape, shape, strict=True)]
            part = np.pad(np.asarray(part).astype(dtype), padding)
            if weights > 1 and writes == "residual":
                part[..., native.norm_dim :] *= eps_z
            if weights > 1 and reads == "residual":
                part[native.norm_dim // SIZE :] /= eps_z
            if module in ("q", "k") and native.base_head_dim is not None:
                part = part[..., self.stock.head_order]
            if stored.in_axes is not None:
                part = part.reshape(-1, stored.hf_shape[0]).T
            return self.in_order(module, part)

        return QuantizedArray(
            in_file(leaf.codes, np.int8, 1),
            in_file(leaf.scales, np.float32, SIZE),
            in_file(leaf.mins, np.float32, SIZE),
            kind=leaf.kind,
            writes=0,
            group=SIZE,
            base=stored.hf_shape[-1],
        )


def keep_form(model: Model, eps_z: float | None = None) -> KeptForm:
    """The form of a model in a GGUF file that keeps its blocks. eps_z None: chosen for the rounding
    of float32, or the next larger one with the scales of the state's blocks in float16's range.
    """
    require_blocks(model)
    form = gguf_form(model, "float32", eps_z)
    chosen = form.stock.eps_z
    require(
        eps_z is None or _in_range(model, chosen),
        f"eps_z={eps_z}: scales of the state's blocks leave the range of float16, which GGUF's"
        " blocks have. Give a larger one, up to 1, or leave it out to have it chosen.",
    )
    while chosen < 1 and not _in_range(model, chosen):
        chosen *= 2
    if chosen > form.stock.eps_z and chosen > (best := choose_eps_z(model, "bfloat16")):
        log.warning(
            "eps_z=%s, so that the scales of the state's blocks are in float16's range; above %s"
            " the norms are off by more than the rounding of bfloat16",
            *(chosen, best),
        )
    stock = replace(form.stock, eps_z=chosen, scores_in_rope=True)
    return KeptForm(form.model_config, stock)


def require_blocks(model: Model) -> None:
    """ConfigError for a model without quantised leaves, or with other types than GGUF's."""
    kinds = {
        leaf.kind: name
        for name, leaf in trees.flatten(model.params).items()
        if isinstance(leaf, QuantizedArray)
    }
    advice = "choose another quant, such as q8_0 or q4_1, which quantises the weights anew."
    require(
        bool(kinds),
        "quant='keep' writes the blocks that a model has, and this one has only floats. Load its"
        " base with load_model(FILE.gguf, quantize='keep'), train with quantize.kernels=keep and"
        f" quantize.embedding=keep, or {advice}",
    )
    foreign = sorted(kinds.keys() - set(KEPT))
    require(
        not foreign,
        f"quant='keep': {', '.join(kinds[kind] for kind in foreign)} is stored as"
        f" {', '.join(foreign)}, and a GGUF file has {', '.join(KEPT)}. Quantise the base with one"
        f" of these, or {advice}",
    )


def _in_range(model: Model, eps_z: float) -> bool:
    """Whether float16 holds the scales of the state's blocks times or over eps_z: none is off by
    more than its rounding of the output's largest one, as subnormal ones may be.
    """
    base = model.config.norm_dim
    for name, leaf in trees.flatten(model.params).items():
        reads, writes = KERNELS.get(name.split("/")[-2], ("", ""))
        if not isinstance(leaf, QuantizedArray) or "residual" not in (reads, writes):
            continue
        for part in (leaf.scales, leaf.mins):
            if part is None:
                continue
            at = (..., slice(base, None))
            if reads == "residual":
                at = (*(slice(None),) * (part.ndim + leaf.axis), slice(base // SIZE, None))
            scale = eps_z if writes == "residual" else 1 / eps_z
            state = trees.on_host(part[at]).astype(np.float32) * np.float32(scale)
            inputs = tuple(range(int(name.startswith("layers/")), state.ndim - 1))
            largest = np.abs(state).max(inputs, initial=0.0, keepdims=True)
            with np.errstate(over="ignore", invalid="ignore"):
                error = np.abs(state.astype(np.float16) - state)
            if not (error <= 2.0**-11 * largest).all():
                return False
    return True


def plan_kept(
    form: KeptForm, model: Model, before: Mapping[str, str]
) -> tuple[list[Planned], dict[str, str], str]:
    """The type of each tensor: that of its blocks; of floats that in the base's file if it is in
    `_SAME`, else Q8_0. before: Type names in the file that the model came from, by GGUF name.

    Returns:
      (The tensors in the order of the file; the matrices that are not kept, for the report; the
      name of the file's `gguf.LlamaFileType`.)
    """
    flat, places = trees.flatten(model.params), hf_table(model.config)
    leaves = {gguf_name(name): flat[places[name].leaf] for name in form.table}
    kinds: Counter[str] = Counter()
    tensors, floats = [], dict[str, None]()
    for name, shape in form.shapes.items():
        leaf, was = leaves.get(name), before.get(name, "")
        kind = was if was in _SAME else "Q8_0"
        if isinstance(leaf, QuantizedArray):
            kind = leaf.kind.upper()
            kinds[kind] += 1
        tensors.append(plan_tensor(name, shape, Quant(kind, kind, "")))
        if len(shape) > 1 and not isinstance(leaf, QuantizedArray):
            now = tensors[-1].type.name
            changed = f" ({was} in the base's file)" if was not in ("", now) else ""
            floats[f"{tensor_module(name)} as {now}{changed}"] = None
    [(most, _)] = kinds.most_common(1)
    return tensors, {"not kept": ", ".join(floats) or "none"}, f"MOSTLY_{most}"


# --- the file -------------------------------------------------------------------------------------


def save_gguf(
    out: str | os.PathLike[str],
    model: Model,
    quant: str = "q8_0",
    *,
    eps_z: float | None = None,
) -> dict[str, Any]:
    """Writes a base or fused model as a GGUF file.

    The residual stream, the MLP units and the dims of widened heads get channels of zeros up to
    multiples of 32, the size of llama.cpp's blocks; the function stays the same. The file appears
    whole or not at all, and replaces only a file of this project. Processes that share the model
    call this together: they gather one tensor of one layer at a time, and process 0 writes it.

    Args:
      out: The file to write, *.gguf.
      model: A model of a family that llama.cpp has, not packed. If it came from a .gguf file, that
        file's tokenizer is copied.
      quant: Type of the matrices: "f32", "f16", "bf16", "q8_0", "q4_0" or "q4_1" (llama-quantize
        makes other types from an f16 file). Norms and biases are always float32. "keep": the blocks
        of a model that was loaded with `quantize="keep"` (or quantised as q8_0, q4_0 or q4_1), byte
        for byte, and a fused adapter's next to them; its float matrices get the type in the file
        that it came from if that is F32, F16, BF16 or Q8_0, else Q8_0.
      eps_z: Scale of the stored residual state, as `save_hf` takes it. None: chosen from the
        weights for the rounding of float32 ("f32"), float16 ("f16") or bfloat16.

    Returns:
      {"path", "quant", "types", "fallback", "widths", "filled with zeros", "tokenizer",
      "parameters", "bytes"}; "fallback" names the tensors whose rows no block of their
      type divides, and their types; "not kept" the float matrices of "keep".
      "eps_z" if there is a state to scale, "context" if a sliding window limits
      it, "architecture" if it is not the family's own.

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
    """The absolute path of the file, after checks of the arguments of `save_gguf` that need no
    model.
    """
    require(
        quant in (*QUANTS, KEEP),
        f"quant={quant!r}: {nearest(quant, (*QUANTS, KEEP))}. For other types, such as q4_k_m,"
        " write an f16 file (--quant f16) and quantise it with llama.cpp: `llama-quantize FILE.gguf"
        " OUT.gguf Q4_K_M`.",
    )
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
    """Yields a temporary path next to `target`, which replaces it if the block succeeds."""
    with folder_beside(target) as folder:
        yield folder / target.name
        _refuse_foreign(target)
        fsync(folder / target.name)
        os.replace(folder / target.name, target)
        fsync(target.parent)


def _refuse_foreign(target: Path) -> None:
    """CheckpointError for an existing path that is no file of this project."""
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
