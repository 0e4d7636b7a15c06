"""Loading this project's exports: from a stock directory back to the native fused model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from zflora_jax.adapters.methods import base_config
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import from_dict
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.stored_config import from_file
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.compressed_read import CompressedShards
from zflora_jax.hf.config import from_hf_config, to_hf_config
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
from zflora_jax.hf.shards import Shards, accept_tied_head, read_json
from zflora_jax.hf.stock import TABLES, StockForm, module_of
from zflora_jax.parallel.sharding import placement

MANIFEST, FORMAT, VERSION = "zflora.json", "zflora_jax export", 1
# In a folder of its own, because servers load every *.safetensors beside config.json.
SIDE_FOLDER, SIDE_FILE = "zflora", "restore.safetensors"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read zflora.json; CheckpointError where its marker or version is not this project's."""
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory / MANIFEST} is not a manifest of this project"
            f" (format={manifest.get('format')!r}, expected {FORMAT!r})."
        )
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{directory / MANIFEST} has version {manifest.get('version')!r}; this zflora_jax reads"
            f" version {VERSION}."
        )
    return manifest


def load_export(
    directory: Path, hf: Mapping[str, Any], dtype: str, scan_layers: bool, mesh: Any = None
) -> Model:
    """Load the native fused model that an export was made from.

    `unfuse` of it gives the base bit for bit. Without the side file, the numbers that stock form
    rounds are computed back, with a warning.

    Args:
      directory: the export.
      hf: its config.json.
      dtype: of the parameters.
      scan_layers: whether the layers are stacked.
      mesh: that the parameters are divided over; None: whole, on the first device.

    Raises:
      CheckpointError: zflora.json, config.json and the tensors do not belong together.
    """
    manifest = read_manifest(directory)
    what = str(directory)
    native, adapter, form = _read_form(directory, manifest, hf)
    native = native.replace(dtype=dtype, scan_layers=scan_layers)  # type: ignore[arg-type]
    form = StockForm(native, form.eps_z)
    shards = Shards(directory)
    check_layer_count(shards.shapes, native.num_layers, what)
    stock, table = hf_table(form.config), hf_table(native)
    check_tensors(stock, accept_tied_head(shards, form.config), what, native.num_layers)
    kept = {name for name, place in table.items() if form.restored(module_of(place))}
    side = (
        Shards(directory / SIDE_FOLDER, [SIDE_FILE])
        if kept and (directory / SIDE_FOLDER / SIDE_FILE).exists()
        else None
    )
    if side is not None:
        check_tensors(
            {name: table[name] for name in kept},
            side.shapes,
            str(directory / SIDE_FOLDER / SIDE_FILE),
            native.num_layers,
        )
    elif kept:
        warnings.warn(
            f"{directory} lacks {SIDE_FOLDER}/{SIDE_FILE}:"
            f" {', '.join(sorted({module_of(table[name]) for name in kept}))} are recovered by"
            " arithmetic, equal to the base up to rounding.",
            stacklevel=4,
        )

    def read(name: str, place: Place, slices: Slices) -> np.ndarray:
        block, inner = place.block(slices)
        if side is not None and name in kept:
            return _block(side, name, place, block, dtype)[inner]
        if module_of(place) in TABLES and native.base_hidden_size is not None:
            _require_no_state(shards, name, stock[name], place, block)
        x = _block(shards, name, stock[name], block)
        return form.inverse(module_of(place), x, block)[inner]

    where = None if mesh is None else partial(placement, mesh, fused=adapter is not None)
    base = None if adapter is None else manifest["base"].get("name") or ""
    return Model(native, unflatten(gather(table, read, dtype, where)), adapter=adapter, base=base)


def stored_config(directory: Path) -> LlamaConfig:
    """The config of the stock model that an export holds, with quantised kernels or without."""
    return _stored(directory, read_manifest(directory))[1].config


def _stored(directory: Path, manifest: Mapping[str, Any]) -> tuple[LlamaConfig, StockForm]:
    """`_read_stored`, of an export with quantised kernels, too."""
    hf = read_json(directory / "config.json")
    if manifest.get("quant") is not None:
        hf = {key: value for key, value in hf.items() if key != "quantization_config"}
    return _read_stored(directory, manifest, hf)


def load_stock(directory: Path, scan_layers: bool = True, mesh: Any = None) -> Model:
    """Load an export as stock transformers computes it: norm and scale over the full widths; of
    quantised kernels the numbers that their codes and scales stand for.

    For measuring the cost of stock form; use `load_model` to work with the model. Two things differ
    from transformers: this project's RoPE reads no longrope factors, so q and k of widened heads
    are in native order (the factors are compared with config.json); and norms of widened heads add
    rms_norm_eps to a mean over the base's dims.

    Args:
      directory: the export.
      scan_layers: whether the layers are stacked.
      mesh: parameters are divided over it; None: whole, on the first device.

    Returns:
      The model. Parameters have the dtype of the export where that keeps their numbers: not those
      of codes, or of heads whose scale is undone, which are float32. Activations are bfloat16 for a
      bfloat16 export, else float32, because few of jax's backends have float16 kernels.

    Raises:
      CheckpointError: as for `load_export`.
    """
    manifest, what = read_manifest(directory), str(directory)
    (native, form), quant = _stored(directory, manifest), manifest.get("quant")
    config = form.config.replace(
        base_head_dim=native.base_head_dim,
        dtype="bfloat16" if manifest["dtype"] == "bfloat16" else "float32",
        scan_layers=scan_layers,
        joint_head_norms=True,
    )
    shards = Shards(directory) if quant is None else CompressedShards(directory, quant)
    table = hf_table(config)
    check_tensors(table, accept_tied_head(shards, config), what, config.num_layers)

    def read(name: str, place: Place, slices: Slices) -> np.ndarray:
        block, inner = place.block(slices)
        x = _block(shards, name, place, block)
        return form.inverse_heads(module_of(place), x, state=False)[inner]

    where = None if mesh is None else partial(placement, mesh, fused=True)
    computed = {name for name, place in table.items() if quant or form.turned(module_of(place))}
    leaves = gather({name: table[name] for name in computed}, read, np.float32, where)
    stored = {name: place for name, place in table.items() if name not in computed}
    leaves |= gather(stored, read, np.dtype(manifest["dtype"]), where)
    return Model(config, unflatten(leaves))


def _block(
    shards: Shards, name: str, place: Place, block: Slices, dtype: Any = np.float32
) -> np.ndarray:
    """A block of a tensor, which alone is read, in the layout of `place` (native or stock form)."""
    x = as_finite(shards.read(name, place.hf_slices(block)), dtype, name, str(shards.directory))
    return place.to_native(x, slices_shape(block))


def _require_no_state(shards: Shards, name: str, stock: Place, place: Place, block: Slices) -> None:
    """CheckpointError unless the channels of a table behind the base's are zero in `block`'s rows:
    the adapter's state starts there at zero, and the head does not read it.
    """
    axis = 0 if place.in_axes else 1
    behind = list(block)
    behind[axis] = slice(place.shape[axis], stock.shape[axis])
    if block[axis].start == 0 and _block(shards, name, stock, tuple(behind)).any():
        raise CheckpointError(
            f"{shards.directory}: {name} has channels from {place.shape[axis]} on that are not"
            " zero. They are the adapter's state, which other software has changed. Without"
            f" {MANIFEST} the directory loads as an ordinary model."
        )


def _read_form(
    directory: Path, manifest: Mapping[str, Any], hf: Mapping[str, Any]
) -> tuple[LlamaConfig, AdapterConfig | None, StockForm]:
    """(native config, adapter, stock form) of an export, checked against its config.json."""
    try:
        native = from_dict(LlamaConfig, manifest["native_config"], f"{MANIFEST}: native_config")
        adapter = (
            None
            if manifest["adapter"] is None
            else from_file(AdapterConfig, manifest["adapter"], f"{MANIFEST}: adapter")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(directory, error) from None
    if adapter is not None and METHODS[adapter.method].widens:
        base_config(native, adapter)  # raises where the widths are not this adapter's
    return native, adapter, _read_stored(directory, manifest, hf)[1]


def export_config(directory: Path, hf: Mapping[str, Any]) -> LlamaConfig:
    """The model's config, of an export with a manifest.

    Args:
      directory: of the export.
      hf: its config.json, which describes the stock form of the model.

    Raises:
      CheckpointError: manifest or config.json is damaged or was changed.
    """
    return _read_form(directory, read_manifest(directory), hf)[0]


def _read_stored(
    directory: Path, manifest: Mapping[str, Any], hf: Mapping[str, Any]
) -> tuple[LlamaConfig, StockForm]:
    """(native config with the widths that were filled, stock form) of an export, checked against
    its config.json.
    """
    try:
        key = "stored_config" if "stored_config" in manifest else "native_config"
        native = from_dict(LlamaConfig, manifest[key], f"{MANIFEST}: {key}")
        form = StockForm(native, float(manifest["eps_z"]), manifest.get("multiple"))
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(directory, error) from None
    _check_config(str(directory), hf, form)
    return native, form


def _damaged(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{directory / MANIFEST} is incomplete or damaged ({error!r}).")


def _check_config(what: str, hf: Mapping[str, Any], form: StockForm) -> None:
    """CheckpointError unless config.json is what `form` writes, in all that changes the forward
    pass.
    """
    from_hf_config(hf, rope=False)  # refuses unsupported features by name
    expected = to_hf_config(form.config, str(hf.get("dtype")), form.rope)
    free = (
        "dtype",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "architectures",
    )
    wrong = [
        f"{key}={hf.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if key not in free and hf.get(key, value) != value
    ]
    if wrong:
        raise CheckpointError(
            f"{what}: config.json does not fit {MANIFEST}; one of them was changed after the"
            f" export. {'; '.join(wrong)[:600]}"
        )
