"""Loading this project's exports: from a stock directory back to the native fused model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.adapters.methods import base_config
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import from_dict
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.compressed import CompressedShards
from zflora_jax.hf.config import from_hf_config, to_hf_config
from zflora_jax.hf.keys import Place, check_shapes, gather, hf_table
from zflora_jax.hf.shards import Shards, checked_table, read_json, read_place
from zflora_jax.hf.stock import TABLES, StockForm, module_of

MANIFEST, FORMAT, VERSION = "zflora.json", "zflora_jax export", 1
# In a separate folder, because servers load every *.safetensors next to config.json.
SIDE_FOLDER, SIDE_FILE = "zflora", "restore.safetensors"
# Keys of config.json that may differ from the export's: none changes the forward pass.
_FREE = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "architectures")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads zflora.json; CheckpointError where its marker or version is not this project's."""
    manifest = read_json(directory / MANIFEST)
    found, wanted = (manifest.get("format"), manifest.get("version")), (FORMAT, VERSION)
    if found != wanted:
        raise CheckpointError(
            f"{directory / MANIFEST} is not a manifest that this zflora_jax reads: its format and"
            f" version are {found}, expected {wanted}."
        )
    return manifest


@dataclass(frozen=True)
class Export:
    """An export by its zflora.json, checked against its config.json."""

    native: LlamaConfig  # of the fused model
    adapter: AdapterConfig | None  # that was fused; None for a base
    form: StockForm  # of the stored model, whose widths may be filled with zeros
    dtype: str  # of the stored tensors
    quant: str | None  # of the kernels; None: floats
    base: str  # name of the base; "" where it is not known


def read_export(directory: Path, *, quantised: bool = False) -> Export:
    """Reads zflora.json and checks config.json. ConfigError for unsupported features, quantised
    kernels among them unless `quantised` is set; CheckpointError if a file is damaged or they do
    not match.
    """
    manifest, hf = read_manifest(directory), read_json(directory / "config.json")
    if quantised and manifest.get("quant") is not None:
        hf.pop("quantization_config", None)
    try:
        native = from_dict(LlamaConfig, manifest["native_config"], f"{MANIFEST}: native_config")
        stored = manifest.get("stored_config", manifest["native_config"])
        stored = from_dict(LlamaConfig, stored, f"{MANIFEST}: stored_config")
        form = StockForm(stored, float(manifest["eps_z"]), manifest.get("multiple"))
        adapter = manifest["adapter"]
        if adapter is not None:
            adapter = from_dict(AdapterConfig, adapter, f"{MANIFEST}: adapter")
        base = manifest["base"].get("name") or ""
        export = Export(native, adapter, form, manifest["dtype"], manifest.get("quant"), base)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / MANIFEST} is incomplete or damaged ({error!r})."
        ) from None
    if adapter is not None and METHODS[adapter.method].widens:
        base_config(native, adapter)  # raises where the widths are not this adapter's
    from_hf_config(hf, rope=False)  # refuses unsupported features by name
    expected = to_hf_config(form.hf_config, "")
    if (hf.get("rope_scaling") or {}).get("rope_type") == "longrope":
        expected |= longrope(form)
    wrong = [
        f"{key}={hf.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if key not in _FREE and hf.get(key, value) != value
    ]
    if wrong:
        raise CheckpointError(
            f"{directory}: config.json does not fit {MANIFEST}; one of them was changed after the"
            f" export. {'; '.join(wrong)[:600]}"
        )
    return export


def longrope(form: StockForm) -> dict[str, Any]:
    """The RoPE keys by which an export may also say which dims of its widened heads turn."""
    native, factors = form.native, form.rope_divisors.tolist()
    rope = {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
    rope |= {"original_max_position_embeddings": native.max_position_embeddings}
    rope |= {"short_factor": factors, "long_factor": factors}
    theta = {"rope_theta": native.rope_theta}
    return theta | {"rope_scaling": rope, "rope_parameters": theta | rope}


def load_export(directory: Path, dtype: str, scan_layers: bool, mesh: Any = None) -> Model:
    """Loads the native fused model that an export was made from; see `load_model`.

    `unfuse` of it gives the base bit for bit: the side file holds the floats that stock form
    rounds. CheckpointError if zflora.json, config.json and the tensors do not belong together.
    """
    export = read_export(directory)
    native = export.native.replace(dtype=dtype, scan_layers=scan_layers)  # type: ignore[arg-type]
    form = StockForm(native, export.form.eps_z)
    shards = Shards(directory)
    stock, table = checked_table(shards, form.config), hf_table(native)
    kept = {
        name: replace(place, tensor=name, row=0)
        for name, place in table.items()
        if form.restored(module_of(place))
    }
    if kept:
        side = Shards(directory / SIDE_FOLDER, [SIDE_FILE])
        wanted = {name: place.hf_shape for name, place in kept.items()}
        check_shapes(wanted, side.shapes, str(side.directory / SIDE_FILE), MANIFEST)

    def read(name: str, place: Place) -> np.ndarray:
        if name in kept:
            return read_place(side, name, kept[name], dtype)
        x = read_place(shards, name, stock[name])
        found = x[tuple(slice(n) for n in place.shape)]
        # The adapter's state starts at zero, and the head does not read it.
        if module_of(place) in TABLES and np.count_nonzero(found) < np.count_nonzero(x):
            raise CheckpointError(
                f"{directory}: {name} has channels from {native.base_width} on that are not zero."
                " They are the adapter's state, which other software has changed. Without"
                f" {MANIFEST} the directory loads as an ordinary model."
            )
        return form.inverse(module_of(place), found).astype(dtype)

    fused = export.adapter is not None
    params = unflatten(gather(table, read, mesh, fused=fused))
    return Model(native, params, adapter=export.adapter, base=export.base if fused else None)


def load_stock(directory: Path, scan_layers: bool = True, mesh: Any = None) -> Model:
    """Loads an export as stock transformers computes it, to measure the cost of stock form: norms
    and scores over the full widths, codes as floats. Two things differ: q and k of widened heads
    are in native order, and norms of widened heads add rms_norm_eps to a mean over the base's dims;

    Parameters have the dtype of the export if that is exact, else float32; activations are bfloat16
    for a bfloat16 export, else float32.
    """
    export = read_export(directory, quantised=True)
    form, quant = export.form, export.quant
    config = form.config.replace(
        base_head_dim=form.native.base_head_dim,
        dtype="bfloat16" if export.dtype == "bfloat16" else "float32",
        scan_layers=scan_layers,
        joint_head_norms=True,
    )
    shards = Shards(directory) if quant is None else CompressedShards(directory, quant)

    def read(name: str, place: Place) -> np.ndarray:
        if quant is None and not form.rotated(module_of(place)):
            return read_place(shards, name, place, np.dtype(export.dtype))
        return form.inverse_heads(module_of(place), read_place(shards, name, place), state=False)

    return Model(config, unflatten(gather(checked_table(shards, config), read, mesh, fused=True)))
