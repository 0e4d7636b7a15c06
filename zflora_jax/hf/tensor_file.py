"""Writing a safetensors file tensor by tensor, so that no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"} | {
    "int8": "I8",
    "int32": "I32",
    "int64": "I64",
}


def write_tensors(
    path: Path | None,
    specs: Mapping[str, tuple[tuple[int, ...], str]],
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the bytes that `safetensors.numpy.save_file` writes of tensors of one dtype; of several
    the order alone may differ.

    Args:
      path: of the file; None where another process writes it: the tensors are asked for all the
        same, because all processes help to gather them.
      specs: name -> (shape, dtype) of each tensor of the file.
      tensor: name -> the tensor; called once for each, in the order of their names.
      metadata: texts for the header.
    """
    names, at = sorted(specs), 0
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name in names:
        shape, dtype = specs[name]
        end = at + tensor_bytes(specs[name])
        of = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        header[name], at = of, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    if path is None:
        for name in names:
            tensor(name)
        return
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value, (shape, dtype) = tensor(name), specs[name]
            if value.shape != shape or value.dtype != np.dtype(dtype):
                raise ValueError(
                    f"{name} is {value.shape} {value.dtype}; announced: {shape} {dtype}."
                )
            file.write(np.ascontiguousarray(value).view(np.uint8).data)


def tensor_bytes(spec: tuple[tuple[int, ...], str]) -> int:
    """The bytes of a tensor of this (shape, dtype)."""
    shape, dtype = spec
    return int(np.prod(shape)) * np.dtype(dtype).itemsize
