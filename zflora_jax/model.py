"""Model: what the public functions pass around; the abstract shapes of its parameter tree."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from zflora_jax import trees
from zflora_jax.config import AdapterConfig
from zflora_jax.model_config import LlamaConfig
from zflora_jax.trees import Tree


@dataclass(eq=False)
class Model:
    """A Llama: base, fused or packed alike.

    config: LlamaConfig. params: the `params` collection, a nested dict of arrays (see `param_shapes`).
    tokenizer: a transformers tokenizer, or None. source: where the weights came from (a directory, file or hub id), or None.
    adapter: for a fused model, the AdapterConfig it was fused from; None for a base model.
    Treat it as immutable once used: what is derived from it (the packed form that decoding runs) is kept beside it.
    """

    config: LlamaConfig
    params: Tree = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    source: str | None = None
    adapter: AdapterConfig | None = None


_fingerprints: weakref.WeakKeyDictionary[Model, tuple[Tree, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: Model) -> str:
    """`trees.fingerprint` of the model's parameters, computed once as long as it has these."""
    if model not in _fingerprints or _fingerprints[model][0] is not model.params:
        _fingerprints[model] = model.params, trees.fingerprint(model.params)
    return _fingerprints[model][1]


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every base parameter of an unpacked model, e.g. "layers/attn/q/kernel": (L, d, H, k).

    embed/embedding [V, d], lm_head/kernel [d, V] (untied only), final_norm/scale [d]; per layer attn_norm/scale and mlp_norm/scale [d],
    attn/{q [d, H, k], k and v [d, K, k], o [H, k, d]}/kernel, mlp/{gate, up [d, f], down [f, d]}/kernel. With scan_layers the layers are stacked on
    a leading
    axis L under "layers/", else they are "layers_0/" ... without it. d, k, f are the widths in `config`, so a fused config gives the fused shapes.
    """
    from zflora_jax.adapters.methods import group, kernel_shapes

    d, v = config.hidden_size, config.vocab_size
    layer: dict[str, tuple[int, ...]] = {"attn_norm/scale": (d,), "mlp_norm/scale": (d,)}
    layer |= {f"{group(name)}/{name}/kernel": i + o for name, (i, o) in kernel_shapes(config).items()}
    shapes: dict[str, tuple[int, ...]] = {"embed/embedding": (v, d), "final_norm/scale": (d,)}
    if not config.tie_word_embeddings:
        shapes["lm_head/kernel"] = (d, v)
    if config.scan_layers:
        shapes |= {f"layers/{name}": (config.num_layers, *shape) for name, shape in layer.items()}
    else:
        shapes |= {f"layers_{i}/{name}": shape for i in range(config.num_layers) for name, shape in layer.items()}
    return dict(sorted(shapes.items()))
