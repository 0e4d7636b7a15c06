"""Safetensors files of a Hugging Face directory, single or sharded; headers are checked first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import difference
from zflora_jax.hf.keys import IGNORED, TOP_NAMES, Slices

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16", "F64")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError that names the file where it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        advice = ""
        if (path.parent / "adapter_config.json").exists():
            advice = " It holds a PEFT adapter: give its base with --model, and it with --adapter."
        raise CheckpointError(
            f"{path.parent} has no {path.name}; expected a Hugging Face model directory.{advice}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object.")
    return value


def inside(directory: Path, name: str) -> Path:
    """The path of a file in a model directory.

    Links are followed within the directory and, in the hub's cache, into the repository's blob
    folder.

    Raises:
      CheckpointError: `name` is not a plain file name, does not exist, or is a link to another
        place.
    """
    path, root = directory / name, directory.resolve()
    # The hub's models--OWNER--NAME/snapshots/REVISION, or the folder zflora/ in it.
    found = (x.parent.parent for x in (root, root.parent) if x.parent.name == "snapshots")
    home = next(found, root)
    if Path(name).name != name or "\\" in name:
        raise CheckpointError(
            f"{directory}: {name!r} is not a plain file name; shards must lie in the model"
            " directory itself."
        )
    if not path.resolve().is_relative_to(home):
        raise CheckpointError(
            f"{path} is a link that leads out of {directory}; copy the file there, or load the"
            " directory it lives in."
        )
    if not path.is_file():
        raise CheckpointError(f"{directory} lacks the file {name}; download the model again.")
    return path


class Shards:
    """The tensors of a model directory, read by name.

    Attributes:
      directory: the directory.
      shapes: name -> shape of every tensor; buffers that are ignored are left out.

    Raises:
      CheckpointError: a header is broken, weights are pickled, an index disagrees with its shards,
        a tensor is stored twice, or its dtype is not floating point.
    """

    def __init__(
        self,
        directory: Path,
        files: list[str] | None = None,
        dtypes: tuple[str, ...] = FLOATS,
    ) -> None:
        self.directory = directory
        weight_map = self._weight_map() if files is None else None
        self._files: dict[str, tuple[Path, Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(weight_map.values())) if weight_map else files or [SINGLE]:
            path = inside(directory, file)
            handle = self._open(path)
            for name in handle.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                if name in self._files:
                    raise CheckpointError(
                        f"{directory}: tensor {name} is stored twice, in"
                        f" {self._files[name][0].name} and {file}."
                    )
                if weight_map and weight_map.get(name) != file:
                    raise CheckpointError(
                        f"{directory}: {file} holds {name}, which {INDEX} places in"
                        f" {weight_map.get(name)}."
                    )
                self._files[name] = (path, handle)
                if IGNORED.fullmatch(name):
                    continue
                header = handle.get_slice(name)
                if header.get_dtype() not in dtypes:
                    raise CheckpointError(
                        f"{path}: {name} has dtype {header.get_dtype()}; expected"
                        f" {', '.join(FLOATS)}. Dequantise a quantised checkpoint first."
                    )
                self.shapes[name] = tuple(header.get_shape())
        if weight_map and (diff := difference(weight_map, self._files)):
            raise CheckpointError(
                f"{directory}: {INDEX} and the shards do not hold the same tensors:\n{diff}"
            )

    def read(self, name: str, slices: Slices | None = None) -> np.ndarray:
        """Copy a tensor, or a block of it, out of the file; no more than that is read.

        Args:
          name: of the tensor.
          slices: the block; None: the whole tensor.

        Returns:
          The array in its stored dtype (bfloat16 of ml_dtypes).
        """
        path, handle = self._files[name]
        try:
            return handle.get_tensor(name) if slices is None else handle.get_slice(name)[slices]
        except Exception as error:  # the library raises several types for damaged data
            raise CheckpointError(f"{path}: {name} cannot be read: {error}.") from error

    def _weight_map(self) -> dict[str, str] | None:
        if (self.directory / INDEX).exists():
            if (self.directory / SINGLE).exists():
                raise CheckpointError(
                    f"{self.directory} holds both {SINGLE} and {INDEX}; remove the one that is out"
                    " of date."
                )
            weight_map = read_json(self.directory / INDEX).get("weight_map")
            if (
                not isinstance(weight_map, dict)
                or not weight_map
                or not all(isinstance(file, str) for file in weight_map.values())
            ):
                raise CheckpointError(
                    f"{self.directory / INDEX}: weight_map must be a table of tensor name -> file"
                    " name."
                )
            return weight_map
        if not (self.directory / SINGLE).exists():
            pickled = sorted(
                p.name
                for pattern in ("*.bin", "*.pt", "*.pth")
                for p in self.directory.glob(pattern)
            )
            if pickled:
                raise CheckpointError(
                    f"{self.directory} holds pickled weights ({pickled[0]}), which can run code"
                    " when they are read. Convert them to safetensors with transformers'"
                    " save_pretrained, or download the model's safetensors files."
                )
            raise CheckpointError(
                f"{self.directory} has neither {SINGLE} nor {INDEX}; expected a Hugging Face model"
                " directory. (A model on the hub may have pickled weights, *.bin, alone, which are"
                " not downloaded: convert it with transformers' save_pretrained, and load that"
                " directory.)"
            )
        return None

    @staticmethod
    def _open(path: Path) -> Any:
        import ml_dtypes  # noqa: F401 (teaches numpy bfloat16)
        from safetensors import safe_open

        try:
            return safe_open(path, framework="np", backend="pread")
        except Exception as error:
            raise CheckpointError(
                f"{path} is not a readable safetensors file ({error}); it is truncated or damaged."
                " Download or export it again."
            ) from error


def _equal(shards: Shards, one: str, other: str) -> bool:
    """Whether two tensors [rows, width] of one shape hold the same, a few rows at a time."""
    rows, width = shards.shapes[one]
    each = max(1, (1 << 24) // width)
    pieces = ((slice(i, min(i + each, rows)), slice(0, width)) for i in range(0, rows, each))
    return all(np.array_equal(shards.read(one, at), shards.read(other, at)) for at in pieces)


def accept_tied_head(shards: Shards, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a directory without the redundant lm_head that some files of tied models hold.

    Raises:
      CheckpointError: the lm_head differs from the embedding.
    """
    head, embedding = TOP_NAMES["lm_head/kernel"], TOP_NAMES["embed/embedding"]
    if (
        not config.tie_word_embeddings
        or head not in shards.shapes
        or embedding not in shards.shapes
    ):
        return shards.shapes
    if shards.shapes[head] != shards.shapes[embedding] or not _equal(shards, head, embedding):
        raise CheckpointError(
            f"{shards.directory}: config.json ties the head to the embedding, but {head} differs"
            f" from {embedding}. Set tie_word_embeddings to false in config.json if the head is to"
            " be used, or remove the tensor."
        )
    return {name: shape for name, shape in shards.shapes.items() if name != head}
