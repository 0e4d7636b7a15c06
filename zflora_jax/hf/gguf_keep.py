"""quant="keep" of `save_gguf`: the blocks that a model's kernels and tables have, as they are.

A base that was loaded with its file's own blocks is written with the same bytes, and a fused
adapter's blocks stand beside them: its inputs append blocks to each row, its outputs append rows.
What stock form changes is left out of the base's blocks: norm gains and epsilon are no blocks,
eps_z goes into the scales of the state's blocks alone, and the factor of widened heads' scores is a
metadata key of RoPE.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from zflora_jax.core import trees
from zflora_jax.core.architecture import KERNELS
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.hf.gguf_blocks import KEPT, SIZE
from zflora_jax.hf.gguf_form import GGUFForm, gguf_form
from zflora_jax.hf.gguf_names import gguf_name, tensor_kind
from zflora_jax.hf.gguf_types import Planned, Quant, plan_tensor
from zflora_jax.hf.gguf_vocabulary import source_file
from zflora_jax.hf.keys import Place, hf_table
from zflora_jax.hf.state_scale import choose_eps_z
from zflora_jax.hf.stock import module_of, native_leaf
from zflora_jax.ops.quantized import QuantizedArray

log = logging.getLogger(__name__)

# The types that matrices which the model has as numbers keep. Of others, such as Q6_K, the numbers
# become Q8_0, whose error is far below that of 6 bits.
_SAME = ("F32", "F16", "BF16", "Q8_0")


@dataclasses.dataclass(frozen=True)
class KeptForm(GGUFForm):
    """The form of a model in a GGUF file, quantised leaves as codes and scales."""

    def tensor(self, model: Model, name: str, stored: Place, wanted: tuple[int, ...]) -> Any:
        """One tensor, as `GGUFForm.tensor` has it; of a quantised leaf codes [out, in] and float32
        scales [out, in / 32].
        """
        place = hf_table(model.config)[name]
        leaf = native_leaf(model, place)
        if not isinstance(leaf, QuantizedArray):
            return super().tensor(model, name, stored, wanted)
        module = module_of(place)

        def in_file(part: np.ndarray | None) -> Any:
            if part is None:
                return None
            if module in ("q", "k") and self.stock.native.base_head_dim is not None:
                part = part[..., self.stock.head_order]
            if stored.in_axes is not None:
                part = part.reshape(-1, stored.hf_shape[0]).T
            return self.in_order(module, part)

        codes, scales, mins = _filled(leaf, stored.shape)
        if module in KERNELS:
            _scale_state(module, [scales, mins], self.stock.native.norm_dim, self.stock.eps_z)
        parts = {"codes": in_file(codes), "scales": in_file(scales), "mins": in_file(mins)}
        return QuantizedArray(
            **parts, kind=leaf.kind, writes=0, group=SIZE, base=stored.hf_shape[-1]
        )


def _filled(w: QuantizedArray, shape: tuple[int, ...]) -> Iterator[np.ndarray | None]:
    """Codes, float32 scales and mins with zeros up to `shape`. A code of zero in a block that an
    adapter's inputs leave unfilled need not stand for zero: that channel is.
    """
    groups = list(shape)
    groups[w.axis] //= SIZE
    parts = (w.codes, np.int8, shape), (w.scales, np.float32, groups), (w.mins, np.float32, groups)
    for part, dtype, wanted in parts:
        if part is None:
            yield None
            continue
        pads = [(0, b - a) for a, b in zip(part.shape, wanted, strict=True)]
        yield np.pad(np.asarray(part).astype(dtype), pads)


def _scale_state(module: str, parts: list[np.ndarray | None], base: int, eps_z: float) -> None:
    """Store the residual state times eps_z, in place: rows that write it times eps_z, blocks that
    read it over eps_z.

    Args:
      module: a kernel.
      parts: its scales and mins, in native layout.
      base: the width of the base's residual stream.
      eps_z: a power of two.
    """
    reads, writes = KERNELS[module]
    for part in parts:
        if part is not None and writes == "residual":
            part[..., base:] *= np.float32(eps_z)
        if part is not None and reads == "residual":
            part[base // SIZE :] /= np.float32(eps_z)


def keep_form(model: Model, eps_z: float | None = None) -> KeptForm:
    """The form of a model in a GGUF file that keeps its blocks.

    Args:
      model: a base or fused model, not packed.
      eps_z: None: chosen from the weights, for the rounding of float32, or the next larger one
        whose scales of the state's blocks are in float16's range.

    Raises:
      ConfigError: the model has no blocks, or codes that are none of GGUF's; eps_z cannot be used;
        or as `gguf_form` raises it.
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
    stock = dataclasses.replace(form.stock, eps_z=chosen, scores_in_rope=True)
    return KeptForm(form.model_config, stock)


def require_blocks(model: Model) -> None:
    """ConfigError for a model without quantised leaves, or with others than GGUF's."""
    kinds = {
        leaf.kind: name
        for name, leaf in trees.flatten(model.params).items()
        if isinstance(leaf, QuantizedArray)
    }
    advice = "choose another quant, such as q8_0 or q4_1, which rounds the numbers anew."
    require(
        bool(kinds),
        "quant='keep' writes the blocks that a model has, and this one has numbers alone. Load its"
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
    """Whether the scales of the state's blocks times or over eps_z are float16 numbers: finite, and
    none is off by more than float16's rounding of the largest one of its row, as those of small
    blocks that become subnormal numbers may be.
    """
    config = model.config
    if config.base_hidden_size is None:
        return True
    for name, leaf in trees.flatten(model.params).items():
        module = name.split("/")[-2]
        if not isinstance(leaf, QuantizedArray) or module not in KERNELS:
            continue
        reads, writes = KERNELS[module]
        for part in (leaf.scales, leaf.mins):
            if part is None:
                continue
            if writes == "residual":
                rows = trees.on_host(part[..., config.norm_dim :]).astype(np.float32) * eps_z
                stacked = int(name.startswith("layers/"))
                largest = np.abs(rows).max(tuple(range(stacked, rows.ndim - 1)), keepdims=True)
                if not (np.abs(rows.astype(np.float16) - rows) <= 2.0**-11 * largest).all():
                    return False
            if reads == "residual":
                axis = part.ndim + leaf.axis
                at = (slice(None),) * axis + (slice(config.norm_dim // SIZE, None),)
                blocks = np.abs(trees.on_host(part[at]).astype(np.float32)) / eps_z
                if blocks.max(initial=0.0) > np.finfo(np.float16).max:
                    return False
    return True


def plan_kept(form: KeptForm, model: Model) -> tuple[list[Planned], dict[str, Any], str]:
    """Choose the type of each tensor: of blocks their own, of numbers that of the file that the
    model came from, or Q8_0.

    Returns:
      (The tensors in the order of the file; what to report; the name of the `gguf.LlamaFileType`.)
    """
    from gguf import GGMLQuantizationType

    flat, config = trees.flatten(model.params), form.config
    places = hf_table(model.config)
    leaves = {gguf_name(name): flat[places[name].leaf] for name in form.table}
    file = source_file(model)
    before = {} if file is None else {name: t.kind.name for name, t in file.tensors.items()}
    shapes = form.shapes | {name: x.shape for name, x in form.rope_divisors.items()}
    counts: Counter[str] = Counter()
    tensors, anew = [], dict[str, tuple[set[str], set[str]]]()
    for name, shape in shapes.items():
        leaf = leaves.get(name)
        if isinstance(leaf, QuantizedArray):
            kind = leaf.kind.upper()
            counts[kind] += 1
            tensors.append(Planned(name, shape, GGMLQuantizationType[kind], kind))
            continue
        own = before[name] if before.get(name) in _SAME else "Q8_0"
        quant = Quant(own, "")
        layers, tied = config.num_layers, config.tie_word_embeddings
        planned = plan_tensor(name, shape, quant, layers=layers, tied=tied)
        tensors.append(planned)
        if len(shape) > 1:
            now, was = anew.setdefault(tensor_kind(name), (set(), set()))
            now.add(planned.kind.name)
            was |= {before[name]} if name in before else set()
    text = ", ".join(_written_as(kind, *found) for kind, found in anew.items())
    [(most, _)] = counts.most_common(1)
    return tensors, {"numbers, not blocks": text or "none"}, f"MOSTLY_{most}"


def _written_as(kind: str, now: set[str], was: set[str]) -> str:
    """The types that matrices of a kind get, and those that they had where these are others."""
    text = f"{kind} as {', '.join(sorted(now))}"
    changed = was and was != now
    return f"{text} ({', '.join(sorted(was))} in the base's file)" if changed else text
