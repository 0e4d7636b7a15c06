"""Writing a safetensors file tensor by tensor, so that no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_tensors(
    path: Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensor: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the bytes that `safetensors.numpy.save_file` writes, of tensors of one dtype.

    Args:
      path: of the file; None where another process writes it: the tensors are asked for all the
        same, because all processes help to gather them.
      shapes: name -> shape of each tensor of the file.
      dtype: of all of them, "float32", "bfloat16" or "float16".
      tensor: name -> the tensor; called once for each, in the order of their names.
      metadata: texts for the header.
    """
    names, at = sorted(shapes), 0
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name in names:
        end = at + int(np.prod(shapes[name])) * np.dtype(dtype).itemsize
        of = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [at, end]}
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
            value = tensor(name)
            if value.shape != shapes[name] or value.dtype != np.dtype(dtype):
                raise ValueError(
                    f"{name} is {value.shape} {value.dtype}; announced: {shapes[name]} {dtype}."
                )
            file.write(np.ascontiguousarray(value).view(np.uint8).data)
