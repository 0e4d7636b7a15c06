"""The base model of a run, whether it was loaded for the run or handed in."""

from __future__ import annotations

import logging
from pathlib import Path

from jax.sharding import Mesh

from zflora_jax.adapters.methods import resolve_adapter
from zflora_jax.core.adapter_config import METHODS
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError, require
from zflora_jax.core.model import Model, require_fit
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import flatten
from zflora_jax.hf.hub import HUB_IDS, packaged
from zflora_jax.hf.load import load_model, model_config, model_tokenizer
from zflora_jax.hf.tokenizer import tokenizer_state
from zflora_jax.inference.text import stop_as_trained
from zflora_jax.nn.quantize_model import require_stored_as
from zflora_jax.ops.quantized import QuantizedArray

log = logging.getLogger(__name__)

_WIDTHS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers"),
    *("num_heads", "num_kv_heads", "head_dim"),
)


def load_base(run: RunConfig, mesh: Mesh | None = None) -> Model:
    """Loads the base model of a run in its dtype.

    Args:
      run: The run's settings.
      mesh: Mesh that the model is sharded over, see `make_mesh`; None: one device.

    Raises:
      ConfigError: The model does not fit the settings, see `as_base`.
    """
    return as_base(run, load_model(run.model, run.train.dtype, mesh=mesh, quantize=run.quantize))


def as_base(run: RunConfig, model: Model) -> Model:
    """Returns a model, loaded or given, as the base of a run, with the run's execution settings
    (`TrainConfig.applied_to`) and the stop token that ends the run's trained answers.

    Raises:
      ConfigError: The model is packed, has a tree per layer or a fused adapter that widens it, has
        another dtype than train.dtype, or does not fit other settings of the run.
    """
    merged, execution = model.adapter, model.config.execution
    require(
        merged is None or not METHODS[merged.method].widens,
        f"model {model.source or run.model!r} has {getattr(merged, 'method', '')} fused in; an"
        " adapter on top of it could not be fused. Train on its base.",
    )
    require(
        execution.scan_layers and not execution.packed,
        "the model is packed for decoding or has a tree per layer, and neither can be trained: give"
        " it as load_model(...) loads it, without scan_layers=False.",
    )
    config, leaves = run.train.applied_to(model.config), flatten(model.params).values()
    wanted = str(config.execution.dtype)
    stored = {str(leaf.dtype) for leaf in leaves if not isinstance(leaf, QuantizedArray)}
    for name, dtypes in ("params", stored), ("activations", {str(execution.dtype)}):
        require(
            dtypes == {wanted},
            f"the model's {name} are {', '.join(sorted(dtypes))}, and train.dtype is {wanted}:"
            f" load it with load_model(..., dtype={wanted!r}), or set train.dtype.",
        )
    require_stored_as(model, run.quantize)
    # An adapter merged by addition left an ordinary base.
    base = model.base if merged is None else None
    model = Model(config, model.params, model.tokenizer, model.source, base=base)
    # Targets that match nothing are refused here, before anything slow.
    resolve_adapter(model.config, run.adapter)
    require_fit(run, model)
    return stop_as_trained(model, run.data.prompt_style)


def given_base(run: RunConfig, model: Model) -> Model:
    """Returns `as_base` of a model in memory. It must be the one that run.model names, because
    evaluation and export load that one. Logs a warning if it was loaded from elsewhere or made in
    memory.

    Raises:
      ConfigError: An error of `as_base`; or an adapter was merged into the model, it was resized,
        or its tokenizer was changed.
    """
    base = as_base(run, model)
    advice = "Save it with zf.save_hf(DIR, model), and train with run.model=DIR."
    require(
        model.adapter is None,
        f"the model has {getattr(model.adapter, 'method', '')} merged in, which {run.model!r} has"
        f" not. {advice}",
    )
    if model.source is None or not _same_source(model.source, run.model):
        log.warning(
            "the base %s, but the run says model=%s, which is what eval, generate and export will"
            " load.",
            "was made in memory" if model.source is None else f"was loaded from {model.source}",
            run.model,
        )
        return base
    try:
        config, tokenizer = model_config(model.source), model_tokenizer(model.source)
    except (ConfigError, CheckpointError):  # its files are gone
        return base
    widths = ((name, getattr(model.config, name), getattr(config, name)) for name in _WIDTHS)
    wrong = [f"{name}={mine} here, {its} there" for name, mine, its in widths if mine != its]
    if tokenizer_state(tokenizer) != tokenizer_state(model.tokenizer):
        wrong.append("its chat template or tokens were changed")
    found = f"the model is not what {run.model!r} holds: {', '.join(wrong)}"
    require(not wrong, f"{found}. {advice}")
    return base


def _same_source(a: str, b: str) -> bool:
    """True if two names mean one model: a preset and its hub id, or two paths to one place."""
    hub = [name if packaged(name) else HUB_IDS.get(name, name) for name in (a, b)]
    return hub[0] == hub[1] or Path(a).expanduser().resolve() == Path(b).expanduser().resolve()
