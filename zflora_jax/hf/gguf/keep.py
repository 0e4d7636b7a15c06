"""quant="keep" of `save_gguf`: the blocks of a model's kernels and tables as they are.

A base that was loaded with its file's own blocks is written with the same bytes, and the blocks of
a fused adapter stand next to them: its inputs append blocks to each row, its outputs append rows.
What stock form changes stays out of the base's blocks: norm gains and epsilon are floats, eps_z
goes into the scales of the state's blocks only, and the factor of widened heads' scores is a
metadata key of RoPE.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from zflora_jax.core import trees
from zflora_jax.core.architecture import KERNELS
from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.hf.gguf.form import GGUFForm, gguf_form
from zflora_jax.hf.gguf.names import gguf_name, tensor_module
from zflora_jax.hf.gguf.types import KEPT, SIZE, Planned, Quant, plan_tensor
from zflora_jax.hf.keys import Place, hf_table
from zflora_jax.hf.state_scale import choose_eps_z
from zflora_jax.hf.stock import module_of, native_leaf
from zflora_jax.ops.quantized import QuantizedArray

log = logging.getLogger(__name__)

# Types of the base's file that float matrices get again. Others, such as Q6_K, become Q8_0, whose
# error is far below that of 6 bits.
_SAME = ("F32", "F16", "BF16", "Q8_0")


@dataclasses.dataclass(frozen=True)
class KeptForm(GGUFForm):
    """The form of a model in a GGUF file, quantised leaves as codes and scales."""

    def tensor(self, model: Model, name: str, stored: Place, wanted: tuple[int, ...]) -> Any:
        """Returns one tensor as `GGUFForm.tensor` does; of a quantised leaf codes [out, in] and
        float32 scales [out, in / 32]. A code of zero in the padding of a block need not stand for
        zero: the channel that it reads is.
        """
        place = hf_table(model.config)[name]
        leaf = native_leaf(model, place)
        if not isinstance(leaf, QuantizedArray):
            return super().tensor(model, name, stored, wanted)
        module, native = module_of(place), self.stock.native
        reads, writes = KERNELS.get(module, ("", ""))
        eps_z = np.float32(self.stock.eps_z)

        def in_file(part: np.ndarray | None, dtype: Any, weights: int) -> Any:
            """Codes, or scales or minima, each of several weights, padded and in GGUF's layout."""
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
    """Returns the form of a model in a GGUF file that keeps its blocks, as `gguf_form` does.

    eps_z None: chosen from the weights for the rounding of float32, or the next larger one with the
    scales of the state's blocks in float16's range.
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
    """Raises ConfigError for a model without quantised leaves, or with other types than GGUF's."""
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
    more than its rounding of the largest one of an output, as subnormal ones may be.
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
    """Chooses the type of each tensor: of blocks their own, of floats that of the base's file if it
    is in `_SAME`, else Q8_0.

    before: Type names in the file that the model came from, by GGUF name.

    Returns:
      (The tensors in the order of the file; for the report, the matrices that are not kept; the
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
