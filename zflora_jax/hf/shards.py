"""Safetensors files: reads directories with strict checks, writes single files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import difference
from zflora_jax.hf.keys import (
    IGNORED,
    TOP_NAMES,
    Place,
    as_finite,
    check_layer_count,
    check_shapes,
    hf_shapes,
    hf_table,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_REVISION = re.compile("[0-9a-f]{40}")  # a folder of a hub repository's snapshots
FLOATS = ("F32", "BF16", "F16", "F64")
_NAMES = {
    **{"float32": "F32", "bfloat16": "BF16", "float16": "F16"},
    **{"int8": "I8", "int32": "I32", "int64": "I64"},
}
Spec = tuple[tuple[int, ...], str]  # shape and dtype of a tensor


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; CheckpointError that names the file if it cannot be read."""
    try:
        value = json.loads(inside(path.parent, path.name, missing_ok=True).read_text("utf-8"))
    except FileNotFoundError:
        advice = ""
        if (path.parent / "adapter_config.json").exists():
            advice = " It holds a PEFT adapter: give its base with --model, and it with --adapter."
        raise CheckpointError(
            f"{path.parent} has no {path.name}; expected a Hugging Face model directory.{advice}"
        ) from None
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def inside(directory: Path, name: str, *, missing_ok: bool = False) -> Path:
    """The path of a file of a model, NAME or FOLDER/NAME below its directory.

    Links may lead to places within the directory and, from a snapshot in the hub's cache, to a blob
    of its repository. Any other target must not be read or copied into an export. CheckpointError
    for such a link, or if there is no such file and not `missing_ok`.
    """
    path, root = directory / name, directory.resolve()
    snapshots = [
        at
        for at in (root, *root.parents)
        if at.parent.name == "snapshots" and _REVISION.fullmatch(at.name)
    ]
    try:
        target, found = path.resolve(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop, too long a name, a NUL in it
        raise CheckpointError(
            f"{directory}: {name!r:.80} cannot be the name of a file: {error}."
        ) from None
    in_cache = any(target.parent == at.parent.parent / "blobs" for at in snapshots)
    if not (target.is_relative_to(root) or in_cache):
        raise CheckpointError(
            f"{path} is a link that leads out of {directory}; copy the file there, or load the"
            " directory it lives in."
        )
    if not (found or missing_ok):
        raise CheckpointError(f"{directory} lacks {name}: copy it there, or download it again.")
    return path


class Shards:
    """The tensors of a model directory, read by name; `shapes` lists all but the ignored buffers.

    CheckpointError if a header is broken, weights are pickled, an index disagrees with its shards,
    a tensor is stored twice, or its dtype is not one of `dtypes`.
    """

    def __init__(
        self, directory: Path, files: list[str] | None = None, dtypes: tuple[str, ...] = FLOATS
    ) -> None:
        import ml_dtypes  # noqa: F401 (teaches numpy bfloat16)
        from safetensors import safe_open

        self.directory = directory
        weight_map = _weight_map(directory) if files is None else None
        self._files: dict[str, tuple[Path, Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(weight_map.values())) if weight_map else files or [SINGLE]:
            path = inside(directory, file)
            try:
                handle = safe_open(path, framework="np", backend="pread")
            except Exception as error:
                raise CheckpointError(
                    f"{path} is not a readable safetensors file ({error}); it is truncated or"
                    " damaged. Download or export it again."
                ) from error
            for name in handle.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                wrong = ""
                if name in self._files:
                    wrong = f"is stored twice, also in {self._files[name][0].name}"
                elif weight_map and weight_map.get(name) != file:
                    wrong = f"is placed in {weight_map.get(name)} by {INDEX}"
                elif not IGNORED.fullmatch(name):
                    header = handle.get_slice(name)
                    self.shapes[name], dtype = tuple(header.get_shape()), header.get_dtype()
                    if dtype not in dtypes:
                        wrong = f"has dtype {dtype}; expected {', '.join(FLOATS)}. Dequantise it"
                if wrong:
                    raise CheckpointError(f"{path}: {name} {wrong}.")
                self._files[name] = (path, handle)
        if weight_map and (diff := difference(weight_map, self._files)):
            raise CheckpointError(
                f"{directory}: {INDEX} and the shards do not hold the same tensors:\n{diff}"
            )

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Copies rows of a tensor out of the file, in its stored dtype."""
        path, handle = self._files[name]
        try:
            return handle.get_slice(name)[rows]
        except Exception as error:  # the library raises several types for damaged data
            raise CheckpointError(f"{path}: {name} cannot be read: {error}.") from error


def _weight_map(directory: Path) -> dict[str, str] | None:
    """Tensor -> file by the index; None for a single file."""
    if not (directory / INDEX).exists():
        if (directory / SINGLE).exists():
            return None
        pickled = [p.name for end in ("*.bin", "*.pt", "*.pth") for p in directory.glob(end)]
        raise CheckpointError(
            f"{directory} has neither {SINGLE} nor {INDEX}"
            + (f", but pickled weights ({min(pickled)}), which can run code" if pickled else "")
            + ". Expected a Hugging Face model directory with safetensors files: download them, or"
            " convert a model that has only pickled weights (*.bin, which are not downloaded) with"
            " transformers' save_pretrained."
        )
    if (directory / SINGLE).exists():
        raise CheckpointError(
            f"{directory} holds both {SINGLE} and {INDEX}; remove the one that is out of date."
        )
    found = read_json(directory / INDEX).get("weight_map")
    valid = isinstance(found, dict) and all(isinstance(file, str) for file in found.values())
    if not found or not valid:
        raise CheckpointError(
            f"{directory / INDEX}: weight_map must be a table of tensor name -> file name."
        )
    for file in map(str, found.values()):
        if Path(file).name != file or "\\" in file:
            raise CheckpointError(
                f"{directory}: {file!r:.80} is not a plain file name; shards must lie in the model"
                " directory itself."
            )
    return dict(found)


def checked_table(shards: Shards, config: LlamaConfig) -> Mapping[str, Place]:
    """The table of a config's tensors; CheckpointError unless the directory holds exactly these. A
    tied model's file may repeat the embedding as lm_head.
    """
    what, shapes = str(shards.directory), dict(shards.shapes)
    head, embedding = TOP_NAMES["lm_head/kernel"], TOP_NAMES["embed/embedding"]
    if config.tie_word_embeddings and {head, embedding} <= shapes.keys():
        rows, width = shapes[embedding]
        many = max(1, 2**24 // width)  # parts of a large vocabulary, to save memory
        parts = [slice(i, min(i + many, rows)) for i in range(0, rows, many)]
        if shapes.pop(head) != shapes[embedding] or not all(
            np.array_equal(shards.read(head, part), shards.read(embedding, part)) for part in parts
        ):
            raise CheckpointError(
                f"{what}: config.json ties the head to the embedding, but {head} differs from"
                f" {embedding}. Set tie_word_embeddings to false in config.json if the head is to"
                " be used, or remove the tensor."
            )
    check_layer_count(shapes, config.num_layers, what)
    table = hf_table(config)
    check_shapes(hf_shapes(table), shapes, what, "its config")
    return table


def read_place(shards: Shards, name: str, place: Place, dtype: Any = np.float32) -> np.ndarray:
    """Reads a tensor in native layout; CheckpointError with its `name` unless it is finite."""
    x = as_finite(shards.read(name), dtype, name, str(shards.directory))
    return place.to_native(x)


def write_tensors(
    path: Path | None, specs: Mapping[str, Spec], tensor: Callable[[str], np.ndarray]
) -> None:
    """Writes a safetensors file tensor by tensor, so that only one of them is in memory. The bytes
    equal those of `safetensors.numpy.save_file`, except for the order of several dtypes.

    path: The file; None if another process writes it and this one helps to gather the tensors.
    tensor: Function name -> tensor, called once for each, in the order of their names.
    """
    names, at = sorted(specs), 0
    if path is None:
        for name in names:
            tensor(name)
        return
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name in names:
        (shape, dtype), end = specs[name], at + tensor_bytes(specs[name])
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value, (shape, dtype) = tensor(name), specs[name]
            if value.shape != shape or value.dtype != np.dtype(dtype):
                raise ValueError(
                    f"{name} is {value.shape} {value.dtype}; announced: {shape} {dtype}."
                )
            file.write(np.ascontiguousarray(value).view(np.uint8).data)


def tensor_bytes(spec: Spec) -> int:
    """The bytes of a tensor."""
    shape, dtype = spec
    return int(np.prod(shape)) * np.dtype(dtype).itemsize
