"""A safetensors file that is written tensor by tensor is the one that safetensors writes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from zflora_jax.hf.shards import write_tensors

SHAPES = {"b.weight": (3, 5), "a": (4,), "layers.10": (2, 2), "layers.9": (1, 7)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_safetensors(
    dtype: str, metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    draw, asked = np.random.default_rng(0), []
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    tensors = {name: draw.standard_normal(shape).astype(stored) for name, shape in SHAPES.items()}
    specs = {name: (shape, dtype) for name, shape in SHAPES.items()}

    def tensor(name: str) -> np.ndarray:
        asked.append(name)
        return np.asfortranarray(tensors[name])  # as a transposed view is

    write_tensors(tmp_path / "ours", specs, tensor, metadata)
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_tensors(None, specs, tensor, metadata)  # another process writes
    assert asked == 2 * sorted(SHAPES)


@pytest.mark.parametrize("wrong", [np.zeros((4, 1), np.float32), np.zeros(4, np.float16)])
def test_a_tensor_of_another_shape_or_dtype_is_refused(wrong: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a is .* announced: \(4,\) float32"):
        write_tensors(tmp_path / "file", {"a": ((4,), "float32")}, lambda _: wrong)
