"""Loading this project's exports: from a stock directory back to the native fused model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from zflora_jax.adapters.methods import base_config
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import (
    Bounds,
    ConfigError,
    Count,
    Natural,
    NotNegative,
    check_types,
    from_dict,
    require,
)
from zflora_jax.core.model import Model
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.trees import unflatten
from zflora_jax.hf.compressed import QUANTS, CompressedShards
from zflora_jax.hf.config import from_hf_config, to_hf_config
from zflora_jax.hf.keys import Place, check_shapes, gather, hf_table
from zflora_jax.hf.shards import Shards, checked_table, read_json, read_place
from zflora_jax.hf.stock import (
    TABLES,
    ScaleOfState,
    StockForm,
    module_of,
    scales_state,
    state_share,
)

MANIFEST, FORMAT, VERSION = "zflora.json", "zflora_jax export", 1
# In a separate folder, because servers load every *.safetensors next to config.json.
SIDE_FILE = "zflora/restore.safetensors"
WIDTHS = ("hidden_size", "head_dim", "intermediate_size")
# Keys of config.json that may differ from the export's: none changes the forward pass.
_FREE = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "architectures")


@dataclass(frozen=True)
class BaseFacts:
    """The base of an export."""

    name: str | None  # public name; None if it is unknown
    hidden_size: Count
    head_dim: Count
    intermediate_size: Count
    fingerprint: str | None  # of its parameters; None if loading gives other floats
    codes_fingerprint: str | None = None  # of the codes that the floats come from


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of zflora.json."""

    format: str = FORMAT
    version: int = VERSION
    project_version: str
    dtype: Literal["float32", "bfloat16", "float16"]  # dtype of the stored tensors
    adapter: AdapterConfig | None  # the fused adapter; None for a base
    base: BaseFacts
    native_config: LlamaConfig  # config of the fused model
    padding: Natural  # zero channels of the stored residual stream
    eps_z: ScaleOfState
    # `stock.state_share` of the model: a wrong eps_z gives another one. None: not recorded.
    state_share: NotNegative | None = None
    quant: Annotated[str, Bounds(", ".join(QUANTS), QUANTS.__contains__)] | None = None
    stored_config: LlamaConfig | None = None  # with filled heads and MLP units; None: native_config
    multiple: Count | None = None  # see `StockForm`
    figures: Any = None  # a table for readers, or None
    files: tuple[str, ...] = ()
    digests: Any = None  # SHA-256 of files without tensors, by name; None: not recorded

    def __post_init__(self) -> None:
        check_types(self)
        require(
            isinstance(self.figures, dict | None),
            f"figures={self.figures!r:.60}: expected a table.",
        )
        config, adapter, form = self.native_config, self.adapter, self.form
        widens = adapter is not None and METHODS[adapter.method].widens
        base = base_config(config, adapter) if adapter and widens else config
        eps_z = self.eps_z if scales_state(config) else 1.0
        wanted: dict[str, Any] = {"padding": (self.padding, form.width - config.hidden_size)}
        wanted |= {"eps_z": (self.eps_z, eps_z)}
        wanted |= {f"base.{n}": (getattr(self.base, n), getattr(base, n)) for n in WIDTHS}
        for name, (found, value) in wanted.items():
            require(found == value, f"{name}={found} contradicts native_config: expected {value}.")

    @property
    def form(self) -> StockForm:
        """The form of the stored model, whose widths may be filled with zeros."""
        return StockForm(self.stored_config or self.native_config, self.eps_z, self.multiple)


def read_manifest(directory: Path) -> Manifest:
    """Reads zflora.json; CheckpointError if it is not one that this project writes."""
    values = read_json(directory / MANIFEST)
    found, wanted = (values.get("format"), values.get("version")), (FORMAT, VERSION)
    if found != wanted:
        raise CheckpointError(
            f"{directory / MANIFEST} is not a manifest that this zflora_jax reads: its format and"
            f" version are {found}, expected {wanted}."
        )
    adapter = values.get("adapter")
    method = adapter.get("method") if isinstance(adapter, dict) else None
    if isinstance(method, str) and method not in METHODS:
        raise CheckpointError(
            f"{directory / MANIFEST} names method {method!r}, which this process does not have:"
            " add it by zf.add_method, or correct the name."
        )
    try:
        return from_dict(Manifest, values)
    except ConfigError as error:
        raise CheckpointError(
            f"{directory / MANIFEST} is incomplete or damaged: {error} Copy the file from the"
            " export again, or export once more."
        ) from None


def read_export(directory: Path, *, quantised: bool = False) -> Manifest:
    """Reads zflora.json and checks config.json. ConfigError for unsupported features, including
    quantised kernels unless `quantised` is set; CheckpointError if a file is damaged or the two do
    not match.
    """
    manifest, hf = read_manifest(directory), read_json(directory / "config.json")
    if quantised and manifest.quant is not None:
        hf.pop("quantization_config", None)
    stock = from_hf_config(hf, rope=False)  # refuses unsupported features by name
    form, sizes = manifest.form, {"num_layers": "num_hidden_layers", "head_dim": "head_dim"}
    expected = {key: getattr(form.config, name) for name, key in sizes.items()}
    if all(getattr(stock, name) == expected[key] for name, key in sizes.items()):
        expected = to_hf_config(form.hf_config, "")  # with lists of these lengths
        rope = hf.get("rope_scaling")
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            expected |= longrope(form)
    wrong = [
        f"{key}={hf.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if key not in _FREE and not _alike(hf.get(key, value), value)
    ]
    if wrong:
        raise CheckpointError(
            f"{directory}: config.json does not fit {MANIFEST}; one of them was changed after the"
            f" export. {'; '.join(wrong)[:600]}"
        )
    return manifest


def _alike(found: Any, value: Any) -> bool:
    """True if two values of JSON are equal. Floats may differ in their last bits, as powers do
    between machines.
    """
    if isinstance(value, dict) and isinstance(found, dict):
        return found.keys() == value.keys() and all(_alike(found[k], value[k]) for k in value)
    if isinstance(value, list) and isinstance(found, list):
        return len(found) == len(value) and all(map(_alike, found, value))
    if isinstance(value, float) and isinstance(found, float):
        return math.isclose(found, value, rel_tol=1e-12)
    return bool(found == value)


def longrope(form: StockForm) -> dict[str, Any]:
    """Alternative RoPE keys of an export that choose the rotated dims of its widened heads."""
    native, factors = form.native, form.rope_divisors.tolist()
    rope = {"rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0}
    rope |= {"original_max_position_embeddings": native.max_position_embeddings}
    rope |= {"short_factor": factors, "long_factor": factors}
    theta = {"rope_theta": native.rope_theta}
    return theta | {"rope_scaling": rope, "rope_parameters": theta | rope}


def load_export(directory: Path, dtype: str, scan_layers: bool, mesh: Any = None) -> Model:
    """Loads the native fused model of an export; see `load_model`.

    `unfuse` of it gives the base bit for bit, because the side file holds the floats that stock
    form rounds. CheckpointError if zflora.json, config.json and the tensors do not match.
    """
    export = read_export(directory)
    native = export.native_config.replace(dtype=dtype, scan_layers=scan_layers)  # type: ignore[arg-type]
    form = StockForm(native, export.eps_z)
    shards = Shards(directory)
    stock, table = checked_table(shards, form.config), hf_table(native)
    kept = {name: x.hf_shape for name, x in table.items() if form.restored(module_of(x))}
    if kept:
        side = Shards(directory, [SIDE_FILE])
        check_shapes(kept, side.shapes, f"{directory}/{SIDE_FILE}", MANIFEST)

    def read(name: str, place: Place) -> np.ndarray:
        if name in kept:
            return read_place(side, name, place, dtype)
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
    base = export.base.name or "" if fused else None
    model = Model(native, params, adapter=export.adapter, base=base)
    found, there = state_share(model), export.state_share
    if there is not None and not 0.9 * there <= found <= 1.1 * there:  # rounding is far less
        raise CheckpointError(
            f"{directory}: {MANIFEST} and the weights do not belong together: read with its eps_z ="
            f" {export.eps_z}, the adapter's state has {found:.3g} of the base's energy; it had"
            f" {there:.3g}. Copy both from one export."
        )
    return model


def load_stock(directory: Path, scan_layers: bool = True, mesh: Any = None) -> Model:
    """Loads an export for computation as in stock transformers, to measure the cost of stock form:
    norms and scores over the full widths, codes as floats. Three things differ: q and k of widened
    heads are in native order, their norms add rms_norm_eps to a mean over the base's dims, and the
    adapter's dims are not rotated, where Llama 3's scaling would rotate them slightly.

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
