"""The GGUF container (llama.cpp): metadata and tensors as they lie in the file.

The `gguf` package has a reader too. This one checks every length against the size of the file, so
a truncated or damaged file is an error that names it, and it reads a vocabulary in one plain loop.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes, of the tensors' data; "general.alignment" overrides it

# The kinds of metadata values by number, as codes of `struct`; strings and arrays apart.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """One stored tensor.

    Attributes:
      name: GGUF's name, such as "blk.0.attn_q.weight".
      shape: in the order of the array, outputs first (the file lists the axes backwards).
      kind: a `gguf.GGMLQuantizationType`.
      data: the stored bytes, uint8 [*shape[:-1], bytes of a row], as `gguf.dequantize` takes them;
        a view of the mapped file.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray


class GGUFFile:
    """A GGUF file, mapped into memory.

    Attributes:
      path: the file.
      tensors: its tensors by name, in the order of the file.

    Raises:
      CheckpointError: the file is truncated or damaged, or its numbers are big-endian.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A slice of a plain array is made ten times as fast as one of a memmap.
            data = np.memmap(path, mode="r").view(np.ndarray)
            cursor, tensor_count, value_count = _header(data, path)
            self._values: dict[str, Any] = {}
            for _ in range(value_count):
                key = cursor.string().decode()
                if key in self._values:
                    raise ValueError(f"the metadata key {key} occurs twice")
                self._values[key] = _value(cursor, cursor.number("I"))
            self.tensors = _tensors(data, cursor, tensor_count, self.get("general.alignment"))
        except CheckpointError:
            raise
        except Exception as error:  # numpy, struct and the enum of kinds each raise their own
            raise CheckpointError(
                f"{path} is not a readable GGUF file ({error}); it is truncated or damaged."
                " Download it again."
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key.

        Args:
          key: such as "llama.block_count".
          default: returned where the file has no such key.

        Returns:
          A number, a str, or a list of either.

        Raises:
          CheckpointError: the value is text that is not UTF-8.
        """
        value = self._values.get(key)
        try:
            match value:
                case None:
                    return default
                case bytes():
                    return value.decode()
                case [bytes(), *_]:
                    return [text.decode() for text in value]
                case np.ndarray():
                    return value.tolist()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: the metadata key {key} cannot be read ({error}); the file is"
                " damaged. Download it again."
            ) from None
        return value

    def below(self, prefix: str) -> dict[str, Any]:
        """The metadata whose keys start with `prefix`, in the order of the file; as `get`."""
        return {key: self.get(key) for key in self._values if key.startswith(prefix)}

    def dequantised(self, tensor: Tensor) -> np.ndarray:
        """The numbers of one of the file's tensors, float32.

        Raises:
          CheckpointError: there is no code for its kind.
        """
        from gguf import dequantize

        try:
            return dequantize(tensor.data, tensor.kind)
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: {tensor.name} cannot be dequantised: {error}."
            ) from error


class _Cursor:
    """Reads a little-endian file from front to back; ValueError at its end."""

    def __init__(self, data: np.ndarray, start: int) -> None:
        self._view, self.at = data.data, start

    def take(self, size: int) -> memoryview:
        end = self.at + size
        if end > len(self._view):
            raise ValueError(f"it ends before byte {end} that its header refers to")
        found = self._view[self.at : end]
        self.at = end
        return found

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def numbers(self, code: str, count: int) -> np.ndarray:
        dtype = np.dtype("<" + code)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def string(self) -> bytes:
        return bytes(self.take(self.number("Q")))


def _header(data: np.ndarray, path: Path) -> tuple[_Cursor, int, int]:
    """(a cursor behind the header, the number of tensors, the number of metadata keys)."""
    if data[:4].tobytes() != _MAGIC:
        if path.suffix != ".gguf":
            raise CheckpointError(
                f"{path} is a file of an unknown kind; give a .gguf file, or the directory that"
                " holds config.json and the safetensors files."
            )
        raise ValueError("GGUF magic invalid")
    cursor = _Cursor(data, 4)
    version = cursor.number("I")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
        raise CheckpointError(
            f"{path} is a big-endian GGUF file; only little-endian ones can be read. Convert the"
            " model again without --bigendian, or the file with `gguf-convert-endian FILE little`."
        )
    if version not in _VERSIONS:
        raise ValueError(f"version {version} of the format is not supported")
    return cursor, cursor.number("Q"), cursor.number("Q")


def _value(cursor: _Cursor, kind: int) -> Any:
    """A metadata value. Text stays bytes, because an unused value need not be UTF-8."""
    if kind == _STRING:
        return cursor.string()
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind != _ARRAY:
        raise ValueError(f"it holds a value of the unknown kind {kind}")
    item, count = cursor.number("I"), cursor.number("Q")
    if item == _STRING:
        return [cursor.string() for _ in range(count)]
    if item not in _SCALARS:
        raise ValueError(f"it holds an array of the kind {item}")
    return cursor.numbers(_SCALARS[item], count)


def _tensors(data: np.ndarray, cursor: _Cursor, count: int, alignment: Any) -> dict[str, Tensor]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    infos = []
    for _ in range(count):
        name = cursor.string().decode()
        shape = tuple(cursor.numbers("Q", cursor.number("I")).tolist()[::-1])
        infos.append((name, shape, GGMLQuantizationType(cursor.number("I")), cursor.number("Q")))
    alignment = _ALIGNMENT if alignment is None else alignment
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment={alignment!r} is not a power of two")
    start = -(-cursor.at // alignment) * alignment
    found: dict[str, Tensor] = {}
    for name, shape, kind, offset in infos:
        if name in found:
            raise ValueError(f"the tensor {name} occurs twice")
        rows = quant_shape_to_byte_shape(shape, kind)
        body = _Cursor(data, start + offset).numbers("B", math.prod(rows))
        found[name] = Tensor(name, shape, kind, body.reshape(rows))
    return found
