"""Models from GGUF files (llama.cpp): dequantised tensor by tensor, or with the file's own blocks.
Needs no torch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.quantize_config import QuantizeConfig
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.gguf_blocks import KEPT, SIZE, from_blocks
from zflora_jax.hf.gguf_config import factor_of_scores, gguf_config
from zflora_jax.hf.gguf_names import ROPE_DIVISORS, half_split, has_pairs, hf_name
from zflora_jax.hf.gguf_reader import GGUFFile, Tensor
from zflora_jax.hf.gguf_tokenizer import gguf_tokenizer
from zflora_jax.hf.keys import (
    Place,
    Slices,
    as_finite,
    check_layer_count,
    check_tensors,
    gather,
    hf_table,
)
from zflora_jax.hf.quantized_leaves import QuantizedLeaves, native_blocks, whole_groups
from zflora_jax.hf.stock import StockForm, module_of
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.parallel.sharding import placement

log = logging.getLogger(__name__)


def load_gguf(
    path: Path, dtype: str, scan_layers: bool, mesh: Any = None, how: QuantizeConfig | None = None
) -> Model:
    """Load the model in a GGUF file.

    Args:
      path: the file.
      dtype: "float32" or "bfloat16", of the parameters; each tensor is dequantised in float32 and
        cast on its own.
      scan_layers: whether the layers are stacked on a leading axis.
      mesh: that the parameters are divided over; None: whole, on the first device.
      how: what is stored as codes; None: nothing. What it asks to keep and cannot be kept, such as
        blocks of other kinds than `gguf_blocks.KEPT`, becomes numbers, and the log says why.

    Returns:
      The model, with the tokenizer that the metadata describe (None with a warning if it is of an
      unknown kind).

    Raises:
      ConfigError: the forward pass has no code for the model.
      CheckpointError: the file is damaged or one part of a split model, or its tensors are missing,
        unexpected, misshapen or not finite.
    """
    file, what = GGUFFile(path), str(path)
    if (parts := file.get("split.count", 1)) > 1:
        raise CheckpointError(
            f"{path} is one of the {parts} files of a split model. Join them with llama.cpp's"
            " `llama-gguf-split --merge FIRST_FILE JOINED.gguf` and load the joined file."
        )
    named = {hf_name(name): t for name, t in file.tensors.items() if name != ROPE_DIVISORS}
    config = gguf_config(file).replace(dtype=dtype, scan_layers=scan_layers)  # type: ignore[arg-type]
    check_layer_count(named, config.num_layers, what)
    table = hf_table(config)
    shapes = {name: tensor.shape for name, tensor in named.items()}
    check_tensors(table, shapes, what, config.num_layers)
    tensors = _Tensors(file, named, config)
    leaves = QuantizedLeaves(
        config, how or QuantizeConfig(), mesh, tensors.read, tensors.in_file, tensors.blocks
    )
    sharding = None if mesh is None else partial(placement, mesh)
    params = unflatten(gather(table, tensors.read, dtype, sharding, leaves))
    if leaves.left:
        log.warning(
            "%s: read as %s numbers, as blocks of %s alone are kept: %s",
            *(what, dtype, ", ".join(KEPT).upper(), leaves.left_text),
        )
    return Model(config, params, tokenizer=gguf_tokenizer(file, config))


def has_blocks(path: Path) -> bool:
    """Whether a GGUF file has tensors of a kind that is kept as it is; only headers are read."""
    return any(tensor.kind.name.lower() in KEPT for tensor in GGUFFile(path).tensors.values())


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a file by Hugging Face's names, read into native layout."""

    file: GGUFFile
    named: dict[str, Tensor]
    config: LlamaConfig

    def read(self, name: str, place: Place, slices: Slices) -> np.ndarray:
        """Numbers. A block of quantised ones cannot be cut, so the tensor is read whole."""
        tensor = self.named[name]
        array = self.file.dequantised(tensor)
        if heads := self._heads(name):
            array = half_split(array, heads)
        # Wider heads have their q scaled, which is undone before the one cast.
        dtype = np.float32 if self.config.base_head_dim else self.config.execution.dtype
        array = place.to_native(as_finite(array, dtype, tensor.name, str(self.file.path)))
        return self._stock.inverse_heads(module_of(place), array)[slices]

    def in_file(self, name: str, place: Place) -> tuple[str, str | None]:
        """The type of a tensor, and why its blocks cannot be kept; see `QuantizedLeaves`."""
        kind = self.named[name].kind.name
        if kind.lower() not in KEPT:
            return kind, ""
        if not whole_groups(place, SIZE):
            return kind, f", whose blocks of {SIZE} go across heads of {self.config.head_dim}"
        if self._turned(place) and not self._stock.scores_in_rope:
            return kind, ", which holds a factor of the widened heads"
        return kind, None

    @property
    def _stock(self) -> StockForm:
        return StockForm(self.config, 1.0, scores_in_rope=factor_of_scores(self.file) != 1)

    def _turned(self, place: Place) -> bool:
        """Whether a tensor has the dims of wider heads in the order of stock form."""
        return self.config.base_head_dim is not None and module_of(place) in ("q", "k")

    def blocks(self, name: str, place: Place) -> QuantizedArray:
        """The blocks as codes and scales."""
        tensor = self.named[name]
        found = from_blocks(tensor.data, tensor.kind.name.lower())
        for scales in (found.scales, found.mins):
            if scales is not None:
                as_finite(scales, np.float16, f"a scale of {tensor.name}", str(self.file.path))
        if heads := self._heads(name):
            found = jax.tree.map(lambda part: half_split(part, heads), found)
        if self._turned(place):
            native, dims = np.argsort(self._stock.head_order), self.config.head_dim
            found = jax.tree.map(
                lambda part: part.reshape(heads, dims, -1)[:, native].reshape(part.shape), found
            )
        return native_blocks(found, place)

    def _heads(self, name: str) -> int:
        """How many heads' rows a tensor has in llama.cpp's order; 0 for none."""
        if not has_pairs(self.file.get("general.architecture")):
            return 0
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        return next((count for module, count in heads.items() if f".{module}." in name), 0)
