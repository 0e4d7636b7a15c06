"""Methods as integers: which streams are widened by how much, the blocks of each kernel,
and where they are live.

The methods and their construction are this project's reconstruction of zFLoRA (arXiv 2510.25784)
and FLoRA (arXiv 2511.00050), whose method sections could not be obtained; see README.

Letters: d residual width, H query heads, K key/value heads, k head dim, f MLP units; r, e, m the
channels that an adapter adds to d, k, f.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from zflora_jax.core.adapter_config import METHODS, OF_BASE, AdapterConfig
from zflora_jax.core.architecture import ATTENTION, KERNELS, MLP, kernel_shapes
from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.core.model_config import LlamaConfig

_STAGE = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}  # the order within a layer

_NEEDS = {  # what a stream needs to be widened
    "residual": "the residual state needs o or down and one of q, k, v, gate, up",
    "heads": "head dims need v and o, or q and k with head_scores, and extra_head_dim above 0",
    "mlp": "MLP units need gate, up and down, and extra_mlp_units above 0",
}

FROZEN = ("start_a", "start_b")  # blocks that are never trained: what is taken off the base

# Head sizes that the attention kernels of common servers are built for (docs/export.md).
SERVED_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@dataclass(frozen=True)
class ResolvedAdapter:
    """An adapter on a model of certain widths.

    Attributes:
      residual: r, extra channels of the residual stream.
      heads: e, extra dims of each head.
      mlp: m, extra MLP units.
      blocks: kernel -> its block names, in the order of initialisation.
    """

    residual: int = 0
    heads: int = 0
    mlp: int = 0
    blocks: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def target_kernels(targets: str) -> tuple[str, ...]:
    """The kernels that `AdapterConfig.targets` selects.

    Args:
      targets: "all", "attention", "mlp", or a regex that must match a kernel name in full.

    Raises:
      ConfigError: it is not a valid regex, or it selects no kernel.
    """
    named = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}
    if targets in named:
        return named[targets]
    try:
        chosen = tuple(name for name in KERNELS if re.fullmatch(targets, name))
    except (re.error, OverflowError, RecursionError) as error:  # "q{99999999999}" overflows
        raise ConfigError(
            f"adapter.targets={targets!r} is not a valid regex ({error}); use"
            f" {nearest(targets, named)} or a regex such as 'q|v'."
        ) from None
    require(
        bool(chosen),
        f"adapter.targets={targets!r} matches no kernel; kernels are {', '.join(KERNELS)} (or use"
        " 'all', 'attention', 'mlp'). Matching is on the full name.",
    )
    return chosen


def default_extra_head_dim(head_dim: int) -> int:
    """e, the smallest width that makes head_dim + e one of `SERVED_HEAD_DIMS`.

    Raises:
      ConfigError: there is no larger served head size.
    """
    for served in SERVED_HEAD_DIMS:
        if served > head_dim:
            return served - head_dim
    raise ConfigError(
        f"head_dim={head_dim} has no larger served head size"
        f" ({', '.join(map(str, SERVED_HEAD_DIMS))}); set adapter.extra_head_dim yourself."
    )


def resolve_adapter(config: LlamaConfig, adapter: AdapterConfig) -> ResolvedAdapter:
    """Resolve `adapter` on a base model: the extra widths and the blocks of each kernel.

    A stream is widened only where its adapter channels can carry something: a targeted kernel
    writes them and another reads them. The residual state needs one of o, down and one of q, k, v,
    gate, up; MLP units need gate, up and down; head dims need v and o, or q and k (the score term).

    Args:
      config: of the base.
      adapter: of any method.

    Raises:
      ConfigError: the targets match no kernel or leave no stream to widen, or the method widens and
        the model is widened already.
    """
    row = METHODS[adapter.method]
    chosen = set(target_kernels(adapter.targets))
    if row.in_place == "full":
        require(
            adapter.targets == "all",
            f"adapter.targets={adapter.targets!r}: method 'full' trains every base parameter; leave"
            " targets at 'all'.",
        )
        return ResolvedAdapter()
    if row.in_place in ("lora", "ffa"):
        names = _lora_blocks(config, adapter, chosen) if row.in_place == "lora" else ("ffa_a",)
        return ResolvedAdapter(blocks={kernel: names for kernel in KERNELS if kernel in chosen})
    require(
        not config.widened,
        f"method {adapter.method!r} widens a base model, and this one is widened already: an"
        " adapter is fused into it. Use its base (`unfuse`); 'lora', 'ffa' and 'full' can run"
        " beside it, but are not fused into it.",
    )
    widened = set()  # kernels that read or write the extra head dims
    if {"v", "o"} <= chosen:
        widened |= {"v", "o"}
    if adapter.head_scores and {"q", "k"} <= chosen:
        widened |= {"q", "k"}
    widths = _extra_widths(config, adapter, chosen, heads=bool(widened))
    needs = "; ".join(text for stream, text in _NEEDS.items() if getattr(row, stream))
    require(
        any(widths.values()),
        f"adapter.targets={adapter.targets!r} leaves method {adapter.method!r} nothing to widen:"
        f" {needs}.",
    )
    blocks = {}
    for kernel, (reads, writes) in KERNELS.items():
        if kernel not in chosen:
            continue
        r_in = widths[reads] if reads != "heads" or kernel in widened else 0
        r_out = widths[writes] if writes != "heads" or kernel in widened else 0
        present = {"forward": r_out, "backward": r_in, "cross": r_in and r_out}
        if names := tuple(name for name, width in present.items() if width):
            blocks[kernel] = names
    return ResolvedAdapter(**widths, blocks=blocks)


def _lora_blocks(config: LlamaConfig, adapter: AdapterConfig, chosen: set[str]) -> tuple[str, ...]:
    """The blocks of each kernel of method lora; checks the settings that only it has."""
    wrong = [i for i in adapter.layers_to_transform or () if i >= config.num_layers]
    require(
        not wrong,
        f"adapter.layers_to_transform has {wrong}: this model has the layers 0 to"
        f" {config.num_layers - 1}.",
    )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(adapter, name):
            require(
                any(re.fullmatch(pattern, kernel) for kernel in chosen),
                f"adapter.{name}: {pattern!r} matches none of the kernels"
                f" {', '.join(k for k in KERNELS if k in chosen)}, which adapter.targets="
                f"{adapter.targets!r} selects. Give a regex of whole names, such as 'q|v'.",
            )
    names: tuple[str, ...] = ("lora_a", "lora_b")
    if adapter.init in OF_BASE:
        for kernel in chosen:
            side = min(math.prod(axes) for axes in kernel_shapes(config)[kernel])
            require(
                adapter.rank_of(kernel) <= side,
                f"adapter.init={adapter.init!r}: rank {adapter.rank_of(kernel)} is above the"
                f" smaller side of {kernel}, {side}.",
            )
        names += FROZEN
    return (*names, "magnitude") if adapter.use_dora else names


def _extra_widths(
    config: LlamaConfig, adapter: AdapterConfig, chosen: set[str], heads: bool
) -> dict[str, int]:
    """Extra width of each stream, 0 where no targeted kernel writes or none reads it.

    heads: whether extra head dims are written and read.
    """
    row, widths = METHODS[adapter.method], {"residual": 0, "heads": 0, "mlp": 0}
    if row.residual and chosen & {"o", "down"} and chosen & {"q", "k", "v", "gate", "up"}:
        widths["residual"] = adapter.rank
    if row.heads and heads:
        given = adapter.extra_head_dim
        widths["heads"] = default_extra_head_dim(config.rotary_dim) if given is None else given
    if row.mlp and {"gate", "up", "down"} <= chosen:
        units = adapter.extra_mlp_units
        widths["mlp"] = adapter.rank if units is None else units
    for name, stream in (("extra_head_dim", "heads"), ("extra_mlp_units", "mlp")):
        width = getattr(adapter, name)
        require(
            bool(widths[stream]) or not width,
            f"adapter.{name}={width} changes nothing with adapter.targets={adapter.targets!r}:"
            f" {_NEEDS[stream]}. Leave it unset, or choose other targets.",
        )
    return widths


def fused_config(config: LlamaConfig, adapter: AdapterConfig) -> LlamaConfig:
    """The LlamaConfig of the fused model: the base's with wider streams.

    Args:
      config: of the base.
      adapter: of any method.
    """
    p = resolve_adapter(config, adapter)
    return config.replace(
        hidden_size=config.hidden_size + p.residual,
        head_dim=config.head_dim + p.heads,
        intermediate_size=config.intermediate_size + p.mlp,
        base_hidden_size=config.hidden_size if p.residual else config.base_hidden_size,
        base_head_dim=config.head_dim if p.heads else config.base_head_dim,
    )


def base_config(fused: LlamaConfig, adapter: AdapterConfig) -> LlamaConfig:
    """The inverse of `fused_config`.

    Args:
      fused: of the fused model.
      adapter: that was fused in.

    Raises:
      ConfigError: `adapter` on no base gives `fused`.
    """
    base = fused.replace(
        hidden_size=fused.norm_dim,
        head_dim=fused.rotary_dim,
        base_hidden_size=None,
        base_head_dim=None,
    )
    base = base.replace(
        intermediate_size=fused.intermediate_size - resolve_adapter(base, adapter).mlp
    )
    require(
        fused_config(base, adapter) == fused,
        f"a model with hidden_size={fused.hidden_size}, head_dim={fused.head_dim} was not fused"
        f" from {adapter}.",
    )
    return base


def live_layers(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, dict[str, Sequence[int]]]:
    """The layers where a block can change the model's output; in the others it is dead.

    The residual state is zero until a kernel writes it, so a block that reads it before is dead;
    likewise a block that writes it after the last reader. Head dims and MLP units are written and
    read within their layer, so their blocks are always live. LoRA's are where
    `layers_to_transform` has them.

    Args:
      config: of the base.
      adapter: of any method.

    Returns:
      Kernel -> block name -> layers, for every block of `block_shapes`.
    """
    blocks = resolve_adapter(config, adapter).blocks
    readers = [
        k for k, names in blocks.items() if KERNELS[k][0] == "residual" and "backward" in names
    ]
    writers = [
        k for k, names in blocks.items() if KERNELS[k][1] == "residual" and "forward" in names
    ]

    def live(kernel: str, block: str) -> Sequence[int]:
        if adapter.layers_to_transform is not None:
            return adapter.layers_to_transform
        reads, writes = KERNELS[kernel]
        first, end = 0, config.num_layers
        if reads == "residual" and block in ("backward", "cross"):
            first = int(all(_STAGE[writer] > _STAGE[kernel] for writer in writers))
        if writes == "residual" and block in ("forward", "cross"):
            end -= int(all(_STAGE[reader] < _STAGE[kernel] for reader in readers))
        return range(first, end)

    return {
        kernel: {block: live(kernel, block) for block in names} for kernel, names in blocks.items()
    }
