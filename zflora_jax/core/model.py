"""Model, its fingerprint, and the check that a run can use it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import require
from zflora_jax.core.model_config import LlamaConfig
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.trees import Tree


@dataclass(eq=False)
class Model:
    """A base, fused or packed model.

    Decoding caches a packed copy, and packs again when an array of `params` is replaced.

    Attributes:
      config: Shape and execution.
      params: A nested dict of arrays (`core.architecture.param_shapes`).
      tokenizer: A transformers tokenizer, or None.
      source: Directory, file or hub id that the weights came from, or None.
      adapter: The AdapterConfig that a fused model was fused from; None for a base.
      base: If `source` is an export with an adapter fused in, the base's name in its files, "" for
        none; None if `source` names the base itself.
    """

    config: LlamaConfig
    params: Tree = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    source: str | None = None
    adapter: AdapterConfig | None = None
    base: str | None = None


def require_there(params: Mapping[str, Any]) -> None:
    """Raises ConfigError if the parameters were donated."""
    leaves = jax.tree.leaves(params)
    arrays = (x for x in leaves if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
    require(
        len(leaves) > 0 and not any(x.is_deleted() for x in arrays),
        "the parameters of this model were donated: `swap` writes into them and returns the new"
        " model (live = zf.swap(live, adapters)); fuse(donate=True) and fuse_trained move them into"
        " the fused one. Use that model, or load this one again.",
    )


_fingerprints = weakref.WeakKeyDictionary[Model, tuple[trees.References, str]]()


def fingerprint(model: Model) -> str:
    """`trees.fingerprint` of the model's parameters, computed once for these arrays."""
    require_there(model.params)
    if model not in _fingerprints or not trees.refer_to(_fingerprints[model][0], model.params):
        found = trees.fingerprint(model.params)
        _fingerprints[model] = trees.references(model.params), found
    return _fingerprints[model][1]


def require_fit(run: RunConfig, model: Model) -> None:
    """Raises ConfigError if the model has no tokenizer, or less context than the buckets."""
    require(
        model.tokenizer is not None,
        f"model {run.model!r} comes without a tokenizer, so text cannot be trained on; add its"
        " tokenizer files to the directory.",
    )
    longest, limit = max(run.data.bucket_lengths), model.config.max_position_embeddings
    require(
        longest <= limit,
        f"data.bucket_lengths goes up to {longest}, beyond the model's context of {limit}; leave"
        " out lengths above it.",
    )
