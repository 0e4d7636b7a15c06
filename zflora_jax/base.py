"""The base model of a run: what may be trained on, whether it was loaded for the run or handed in."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

from zflora_jax.adapters.methods import plan
from zflora_jax.config import METHODS, LlamaConfig, RunConfig
from zflora_jax.fields import require
from zflora_jax.hf.load import HUB_IDS
from zflora_jax.model import Model
from zflora_jax.text import stop_as_trained

log = logging.getLogger(__name__)


def as_base(run: RunConfig, model: Model) -> Model:
    """`model`, loaded here or given, as the base of `run`: with its remat and matmul_precision, and
    stopping where the run trains answers to end.

    Raises:
      ConfigError: a model that is packed or has a tree per layer, has an adapter fused in that widens it, is of another dtype than train.dtype,
        or does not fit other settings of the run. A model that is known to come from elsewhere than run.model is warned of.
    """
    if model.adapter is not None:
        require(
            METHODS[model.adapter.method].in_place != "none",
            f"model {model.source or run.model!r} has {model.adapter.method} fused in; an adapter on top of it could not be fused. "
            "Train on its base.",
        )
    require(not model.config.packed, "the model is packed for decoding, and that form cannot be trained; give the one that it was packed from.")
    require(model.config.scan_layers, "the model has a tree per layer, and checkpoints are of stacked ones; load it without scan_layers=False.")
    found: dict[str, set[str]] = {"params": {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)}, "activations": {model.config.dtype}}
    for what, dtypes in found.items():
        require(
            dtypes == {run.train.dtype},
            f"the model's {what} are {', '.join(sorted(dtypes))}, and train.dtype is {run.train.dtype}: load it with load_model(..., "
            f"dtype={run.train.dtype!r}), or set train.dtype.",
        )
    if model.source is not None and not _same_source(model.source, run.model):
        log.warning(
            "the base was loaded from %s, but the run says model=%s, which is what eval, generate and export will load.", model.source, run.model
        )
    # An adapter merged by addition left an ordinary base.
    model = Model(numerics(run, model.config), model.params, model.tokenizer, model.source)
    plan(model.config, run.adapter)  # targets that match nothing are refused here, before anything slow
    require_fit(run, model)
    return stop_as_trained(model, run.data.prompt_style)


def numerics(run: RunConfig, config: LlamaConfig) -> LlamaConfig:
    """`config` with the settings of `run` that say how it is computed, not what it is."""
    return config.replace(remat=run.train.remat, matmul_precision=run.train.matmul_precision)


def _same_source(a: str, b: str) -> bool:
    """Whether two names of models mean one: a preset and its hub id, or two paths of one place."""
    if HUB_IDS.get(a, a) == HUB_IDS.get(b, b):
        return True
    return Path(a).expanduser().resolve() == Path(b).expanduser().resolve()


def require_fit(run: RunConfig, model: Model) -> None:
    """ConfigError for a model without a tokenizer, or with less context than the longest of data.lengths."""
    require(
        model.tokenizer is not None,
        f"model {run.model!r} comes without a tokenizer, so text cannot be trained on; add its tokenizer files to the directory.",
    )
    longest, limit = max(run.data.lengths), model.config.max_position_embeddings
    require(longest <= limit, f"data.lengths goes up to {longest}, beyond the model's context of {limit}; leave out lengths above it.")
