"""The kernels of a model: their names, the streams they read and write, their shapes; parameters by
name and by number.
"""

from __future__ import annotations

import math
from typing import Literal

from zflora_jax.core.model_config import LlamaConfig

Stream = Literal["residual", "heads", "mlp"]


# kernel -> (stream it reads, stream it writes)
KERNELS: dict[str, tuple[Stream, Stream]] = {
    "q": ("residual", "heads"),
    "k": ("residual", "heads"),
    "v": ("residual", "heads"),
    "o": ("heads", "residual"),
    "gate": ("residual", "mlp"),
    "up": ("residual", "mlp"),
    "down": ("mlp", "residual"),
}


ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
QK_NORMS = ("q_norm", "k_norm")

# The leaf of a model packed for decode -> the kernels whose outputs are its rows, in this order.
PACKED = {
    "attn/qkv": ("q", "k", "v"),
    "attn/o": ("o",),
    "mlp/gate_up": ("gate", "up"),
    "mlp/down": ("down",),
}


def group(kernel: str) -> str:
    """The submodule of a block that holds the kernel: "attn" or "mlp"."""
    return "attn" if kernel in ATTENTION else "mlp"


def kernel_shapes(config: LlamaConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """kernel -> (input axes, output axes) of one layer's kernel, e.g. q: ((d,), (H, k))."""
    d, f, k = (config.hidden_size,), (config.intermediate_size,), config.head_dim
    query, kv = (config.num_heads, k), (config.num_kv_heads, k)
    attention = {"q": (d, query), "k": (d, kv), "v": (d, kv), "o": (query, d)}
    return attention | {"gate": (d, f), "up": (d, f), "down": (f, d)}


def packed_rows(config: LlamaConfig) -> dict[str, tuple[str, int, int]]:
    """kernel -> (the `PACKED` leaf that holds it, its first row there, the row after its last)."""
    shapes, found = kernel_shapes(config.stored), {}
    for leaf, kernels in PACKED.items():
        end = 0
        for kernel in kernels:
            start, end = end, end + math.prod(shapes[kernel][1])
            found[kernel] = leaf, start, end
    return found


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """The parameters of one layer: name, e.g. "attn/q/kernel" -> (shape, number of leading input
    axes of a kernel; 0 for a bias, None for a norm).
    """
    d, k = config.hidden_size, config.head_dim
    shapes: dict[str, tuple[tuple[int, ...], int | None]] = {
        "attn_norm/scale": ((d,), None),
        "mlp_norm/scale": ((d,), None),
    }
    for name, (reads, writes) in kernel_shapes(config).items():
        shapes[f"{group(name)}/{name}/kernel"] = reads + writes, len(reads)
        if has_bias(config, name):
            shapes[f"attn/{name}/bias"] = writes, 0
    if config.traits.qk_norm:
        shapes |= {f"attn/{name}/scale": ((k,), None) for name in QK_NORMS}
    return shapes


def has_bias(config: LlamaConfig, kernel: str) -> bool:
    """True if a bias is added to the kernel's product."""
    return config.traits.qkv_bias and kernel in ATTENTION[:3]


def count_base(config: LlamaConfig) -> int:
    """Parameters of a model of shape `config` (tied embeddings counted once)."""
    return sum(map(math.prod, param_shapes(config).values()))


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every base parameter of an unpacked model, e.g. "layers/attn/q/kernel": (L,
    d, H, k), or without scan_layers "layers_0/attn/q/kernel": (d, H, k).

    A fused config gives the fused shapes. Embedding and head keep the base's width: the adapter
    state starts at zero and the head does not read it.
    """
    d, v = config.hidden_size, config.vocab_size
    layer = {name: shape for name, (shape, _) in layer_shapes(config).items()}
    shapes: dict[str, tuple[int, ...]] = {
        "embed/embedding": (v, config.base_width),
        "final_norm/scale": (d,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head/kernel"] = (config.base_width, v)
    if config.execution.scan_layers:
        shapes |= {f"layers/{name}": (config.num_layers, *shape) for name, shape in layer.items()}
    else:
        for i in range(config.num_layers):
            shapes |= {f"layers_{i}/{name}": shape for name, shape in layer.items()}
    return dict(sorted(shapes.items()))
