"""The GGUF container: metadata and tensors as the `gguf` package reads them, checked for damage."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.errors import CheckpointError


@dataclass(frozen=True)
class Tensor:
    """One stored tensor, a view of the mapped file."""

    name: str  # such as "blk.0.attn_q.weight"
    shape: tuple[int, ...]  # outputs first; the file lists the axes backwards
    type: Any  # a `gguf.GGMLQuantizationType`
    data: np.ndarray  # as `gguf.dequantize` takes it; blocks are uint8 [*shape[:-1], row bytes]


class GGUFFile:
    """A GGUF file, mapped into memory.

    Attributes:
      path: The file.
      tensors: Its tensors by name, in the order of the file.

    Raises:
      CheckpointError: The file is truncated, damaged or big-endian, or is no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.errstate(over="raise"):  # offsets are unsigned integers, which would wrap
                reader = _reader()(path)
            self._fields = reader.fields
            self.tensors = {
                t.name: Tensor(t.name, tuple(t.shape.tolist()[::-1]), t.tensor_type, t.data)
                for t in reader.tensors
            }
        except Exception as error:  # numpy, the enums and the reader each raise their own
            raise CheckpointError(
                f"{path} is not a readable GGUF file ({error}); it is truncated or damaged, or of"
                " another type. Download it again, or give the directory that holds config.json."
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the number, bool, str or list under a metadata key, such as "llama.block_count".
        Raises CheckpointError for text that is not UTF-8.
        """
        if key not in self._fields:
            return default
        try:
            return self._fields[key].contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: the metadata key {key} cannot be read ({error}); the file is"
                " damaged. Download it again."
            ) from None

    def below(self, prefix: str) -> dict[str, Any]:
        """Returns the metadata whose keys start with `prefix`, in the order of the file."""
        return {key: self.get(key) for key in self._fields if key.startswith(prefix)}

    def dequantised(self, tensor: Tensor) -> np.ndarray:
        """Returns a tensor of the file in float32. Raises CheckpointError for a type that the
        `gguf` package cannot dequantise.
        """
        from gguf import dequantize

        try:
            return dequantize(tensor.data, tensor.type)
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: {tensor.name} cannot be dequantised: {error}."
            ) from error


@functools.cache
def _reader() -> Any:
    """The `gguf` package's reader, which checks no length, with a check of every read."""
    from gguf import GGUFReader

    class Reader(GGUFReader):
        def _get(
            self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
        ) -> np.ndarray:
            if self.byte_order != "I":
                raise ValueError("it is big-endian; see gguf-convert-endian")
            if isinstance(self.data, np.memmap):
                # A plain array is sliced several times as fast.
                self.data = self.data.view(np.ndarray)  # type: ignore[assignment]
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"it ends before byte {end} that its header refers to")
            return self.data[offset:end].view(dtype)

    return Reader
