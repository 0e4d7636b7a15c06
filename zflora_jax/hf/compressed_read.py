"""Reading the numbers of a directory with quantised kernels, to measure what an export lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.hf.compressed_types import PLAIN, check_quant, unpack
from zflora_jax.hf.keys import Slices
from zflora_jax.hf.shards import FLOATS, Shards

CODES = ("I8", "I32", "I64")  # dtypes of codes, of words that hold several, and of shapes


class CompressedShards(Shards):
    """The tensors of an export with quantised kernels, as numbers under the names of a float one.

    Args:
      directory: the export.
      quant: that it was written with.

    Raises:
      ConfigError: there is no such `quant`.
      CheckpointError: as for `Shards`.
    """

    def __init__(self, directory: Path, quant: str) -> None:
        super().__init__(directory, dtypes=(*FLOATS, *CODES))
        self._quant = check_quant(quant)
        codes = self._quant.parts[0]
        self._stems = {
            name.removesuffix("weight_scale")
            for name in self.shapes
            if name.endswith(".weight_scale")
        }
        for stem in self._stems:
            rows, width = self.shapes.pop(stem + codes)
            self.shapes.pop(stem + "weight_scale")
            if self._quant.format != PLAIN:
                shape = tuple(map(int, super().read(stem + "weight_shape")))
                if shape[0] != rows or -(-shape[1] * self._quant.bits // 32) != width:
                    raise CheckpointError(
                        f"{directory}: {stem}weight_packed is {rows} x {width} words, and"
                        f" {stem}weight_shape says {shape}."
                    )
                self.shapes.pop(stem + "weight_shape")
                rows, width = shape
            self.shapes[stem + "weight"] = rows, width

    def read(self, name: str, slices: Slices | None = None) -> np.ndarray:
        """Read a tensor, or a block of it: code times scale of a quantised one, float32."""
        stem = name.removesuffix("weight")
        if stem not in self._stems:
            return super().read(name, slices)
        rows, columns = slices or (slice(None), slice(None))
        width = self.shapes[name][1]
        scales = super().read(stem + "weight_scale")[rows].astype(np.float32)
        codes = super().read(stem + self._quant.parts[0])[rows]
        if self._quant.format != PLAIN:
            codes = unpack(codes, self._quant.bits, width)
        numbers = codes * np.repeat(scales, width // scales.shape[1], axis=1)
        return np.asarray(numbers[:, columns], np.float32)
