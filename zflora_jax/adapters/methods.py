"""A method on a model: the extra widths of streams, the adapter of each kernel, the leaves of the
adapters, and the layers where they are live.

The methods are this project's reconstruction of zFLoRA (arXiv 2510.25784) and FLoRA (arXiv
2511.00050), whose method sections could not be obtained; see README.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from zflora_jax.adapters.kernel_adapter import DoRA, KernelAdapter, LowRank, Tiled, Widening
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig, Method
from zflora_jax.core.architecture import (
    ATTENTION,
    KERNELS,
    MLP,
    PACKED,
    group,
    kernel_shapes,
    param_shapes,
)
from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.core.model_config import LlamaConfig

# Kernels of one stage read the same stream at once: q, k, v; o; gate, up; down.
_STAGE = {kernel: i for i, kernels in enumerate(PACKED.values()) for kernel in kernels}

_NEEDS = {  # what a stream needs to be widened
    "residual": "the residual state needs o or down and one of q, k, v, gate, up",
    "heads": "head dims need v and o, or q and k with head_scores, and extra_head_dim above 0",
    "mlp": "MLP units need gate, up and down, and extra_mlp_units above 0",
}

# PEFT's names and lists, and a character class with a letter that no one-letter kernel has.
_LISTED = re.compile(r"""[_\s'",]|^\[[^]]*[^]qkvo^-][^]]*\]$""")

# The methods that a class overrides together: of the forward pass, and of fusing.
_CHANGED: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    LowRank: (("added", "__call__", "flat"), ("delta", "sum", "fuse")),
    Widening: (("__call__",), ("fuse", "unfuse")),
}

# Head sizes that the attention kernels of common servers are built for (docs/export.md).
SERVED_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


@dataclass(frozen=True)
class ResolvedAdapter:
    """An adapter on a model: the extra widths of streams, and the adapter of each kernel."""

    residual: int = 0  # r
    heads: int = 0  # e, of each head
    mlp: int = 0  # m
    kernels: dict[str, KernelAdapter] = field(default_factory=dict)

    @property
    def blocks(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Kernel -> block name -> shape in one layer, in the order of initialisation."""
        return {kernel: kernel_adapter.shapes for kernel, kernel_adapter in self.kernels.items()}

    def extra(self, kernel: str) -> tuple[int, int]:
        """The extra widths of the streams that a kernel reads and writes."""
        reads, writes = KERNELS[kernel]
        return getattr(self, reads), getattr(self, writes)


def target_kernels(targets: str) -> tuple[str, ...]:
    """The kernels that `AdapterConfig.targets` selects; ConfigError if it selects none."""
    named = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}
    if targets in named:
        return named[targets]
    try:
        chosen = matching(targets)
    except (re.error, OverflowError, RecursionError) as error:  # "q{99999999999}" overflows
        raise ConfigError(
            f"adapter.targets={targets!r} is not a valid regex ({error}); use"
            f" {nearest(targets, named)} or a regex such as 'q|v'."
        ) from None
    # As PEFT has them: q_proj,v_proj
    found = [name for name in KERNELS if re.search(rf"\b{name}(_proj)?\b", targets)]
    peft = "all" if targets == "all-linear" else "|".join(found)
    hint = f" Here that is {peft!r}." if peft and ("|" not in targets or "_" in targets) else ""
    require(
        bool(chosen),
        f"adapter.targets={targets!r} is no regex of kernel names; kernels are {', '.join(KERNELS)}"
        f" (or use 'all', 'attention' or 'mlp', alone). Matching is on the full name.{hint}",
    )
    return chosen


def matching(pattern: str) -> tuple[str, ...]:
    """Returns the kernels whose whole name a regex matches. There are none for a list of names,
    which a regex reads as characters, or for names joined by "|" if one of them is no kernel.
    """
    words = set(pattern.split("|")) if re.fullmatch(r"[\w|]+", pattern) else set()
    if _LISTED.search(pattern) or not words <= KERNELS.keys():
        return ()
    return tuple(name for name in KERNELS if re.fullmatch(pattern, name))


def default_extra_head_dim(head_dim: int) -> int:
    """e, the smallest width that makes head_dim + e one of `SERVED_HEAD_DIMS`."""
    served = next((n for n in SERVED_HEAD_DIMS if n > head_dim), 0)
    require(
        bool(served),
        f"head_dim={head_dim} has no larger served head size"
        f" ({', '.join(map(str, SERVED_HEAD_DIMS))}); set adapter.extra_head_dim yourself.",
    )
    return served - head_dim


def resolve_adapter(config: LlamaConfig, adapter: AdapterConfig | None) -> ResolvedAdapter:
    """Resolves `adapter` on a base model: the extra widths and the adapter of each kernel. None
    widens nothing.

    A stream is widened only where a targeted kernel writes its adapter channels and another reads
    them (`_NEEDS`).

    Raises:
      ConfigError: the targets match no kernel or leave no stream to widen, or the method widens and
        the model is widened already.
    """
    if adapter is None:
        return ResolvedAdapter()
    row, axes = METHODS[adapter.method], kernel_shapes(config)
    chosen = target_kernels(adapter.targets)
    if row.in_place == "full":
        require(
            adapter.targets == "all",
            f"adapter.targets={adapter.targets!r}: method 'full' trains every base parameter; leave"
            " targets at 'all'.",
        )
        return ResolvedAdapter()
    if not row.widens:
        _check_lora(config, adapter, chosen)
        kinds = {"lora": DoRA if adapter.use_dora else LowRank, "ffa": Tiled, "own": row.kernel}
        make = kinds[row.in_place]
        s, r = adapter.scale_of, adapter.rank_of
        own = {k: make(*axes[k], s(k), r(k), dropout=adapter.dropout) for k in chosen}
        blocks = {block for kernel_adapter in own.values() for block in kernel_adapter.shapes}
        require(
            row.kernel is None or blocks <= {"lora_a", "lora_b"},
            f"method {adapter.method!r} has blocks {', '.join(sorted(blocks))}: call them lora_a"
            " and lora_b, by which sharding and the optimizer know them.",
        )
        return ResolvedAdapter(kernels=own)
    require(
        not config.widened,
        f"method {adapter.method!r} widens a base model, and this one is widened already: an"
        " adapter is fused into it. Use its base (`unfuse`); 'lora', 'ffa' and 'full' can run"
        " unmerged next to it, but cannot be fused into it.",
    )
    pairs = [{"v", "o"}, {"q", "k"}] if adapter.head_scores else [{"v", "o"}]
    heads = set().union(*(pair for pair in pairs if pair <= {*chosen}))
    widths = _extra_widths(config, adapter, {*chosen}, heads=bool(heads))
    kernels: dict[str, KernelAdapter] = {}
    for kernel in chosen:
        r_in, r_out = (
            widths[stream] if stream != "heads" or kernel in heads else 0
            for stream in KERNELS[kernel]
        )
        if r_in or r_out:
            make = row.kernel or Widening
            kernels[kernel] = make(*axes[kernel], adapter.scale, r_in, r_out, kernel != "q")
    return ResolvedAdapter(**widths, kernels=kernels)


def add_method(name: str, kernel: type[LowRank] | type[Widening]) -> None:
    """Adds a user-defined method, for all functions and commands of this process.

    Args:
      name: Its name, for `AdapterConfig.method`.
      kernel: A frozen dataclass that adapts one kernel. It extends `LowRank`, with blocks lora_a
        and lora_b, or `Widening`, with the widths of zflora-minimal. If it overrides the added
        product (`added`, `__call__`), it must override fusing too (`delta`, `fuse`).

    Raises:
      ConfigError: The name belongs to another class, or the class extends neither, or overrides
        only one of product and fusing.
    """
    extends = [c for c in _CHANGED if isinstance(kernel, type) and issubclass(kernel, c)]
    require(
        bool(extends),
        f"add_method({name!r}, {kernel!r:.60}): expected a class that extends zf.LowRank or"
        " zf.Widening.",
    )
    require(
        name not in METHODS or METHODS[name].kernel is kernel,
        f"method {name!r} is another class in this process, and compiled programs know a method"
        " by its name: choose another name, or restart.",
    )
    own = [
        any(getattr(kernel, part) is not getattr(extends[0], part) for part in parts)
        for parts in _CHANGED[extends[0]]
    ]
    require(
        own[0] == own[1],
        f"add_method({name!r}, {kernel.__name__}): the added product (added, __call__) and fusing"
        " (delta, fuse) belong together, and one of them is"
        f" {extends[0].__name__}'s. Define both.",
    )
    METHODS[name] = (
        Method(residual=True, mlp=True, units=False, kernel=kernel)
        if extends == [Widening]
        else Method(in_place="own", start="kaiming_uniform", kernel=kernel)
    )


def _check_lora(config: LlamaConfig, adapter: AdapterConfig, chosen: Sequence[str]) -> None:
    wrong = [i for i in adapter.layers_to_transform or () if i >= config.num_layers]
    require(
        not wrong,
        f"adapter.layers_to_transform has {wrong}: this model has the layers 0 to"
        f" {config.num_layers - 1}.",
    )
    for pattern, _ in (*adapter.rank_pattern, *adapter.alpha_pattern):
        require(
            any(kernel in chosen for kernel in matching(pattern)),
            f"adapter.rank_pattern or alpha_pattern: {pattern!r} matches none of the kernels"
            f" {', '.join(chosen)}. Give a regex of whole names, such as 'q|v'.",
        )


def _extra_widths(
    config: LlamaConfig, adapter: AdapterConfig, chosen: set[str], heads: bool
) -> dict[str, int]:
    """Extra width of each stream. heads: whether extra head dims are written and read."""
    row, widths = METHODS[adapter.method], {"residual": 0, "heads": 0, "mlp": 0}
    if row.residual and chosen & {"o", "down"} and chosen & {"q", "k", "v", "gate", "up"}:
        widths["residual"] = adapter.rank
    if row.heads and heads:
        given = adapter.extra_head_dim
        widths["heads"] = default_extra_head_dim(config.base_head_width) if given is None else given
    if row.mlp and {"gate", "up", "down"} <= chosen:
        units = adapter.extra_mlp_units
        widths["mlp"] = row.units * adapter.rank if units is None else units
    for name, stream in (("extra_head_dim", "heads"), ("extra_mlp_units", "mlp")):
        width = getattr(adapter, name)
        require(
            bool(widths[stream]) or not width,
            f"adapter.{name}={width} changes nothing with adapter.targets={adapter.targets!r}:"
            f" {_NEEDS[stream]}. Leave it unset, or choose other targets.",
        )
    require(
        any(widths.values()),
        f"adapter.targets={adapter.targets!r} leaves method {adapter.method!r} nothing to widen:"
        f" {'; '.join(text for stream, text in _NEEDS.items() if getattr(row, stream))}.",
    )
    return widths


def fused_config(config: LlamaConfig, adapter: AdapterConfig) -> LlamaConfig:
    """The config of the fused model: the base's with wider streams."""
    p = resolve_adapter(config, adapter)
    return config.replace(
        hidden_size=config.hidden_size + p.residual,
        head_dim=config.head_dim + p.heads,
        intermediate_size=config.intermediate_size + p.mlp,
        base_hidden_size=config.hidden_size if p.residual else config.base_hidden_size,
        base_head_dim=config.head_dim if p.heads else config.base_head_dim,
    )


def base_config(fused: LlamaConfig, adapter: AdapterConfig) -> LlamaConfig:
    """The inverse of `fused_config`; ConfigError if no base with `adapter` gives `fused`."""
    base = fused.replace(
        hidden_size=fused.base_width,
        head_dim=fused.base_head_width,
        base_hidden_size=None,
        base_head_dim=None,
    )
    units = fused.intermediate_size - resolve_adapter(base, adapter).mlp
    base = base.replace(intermediate_size=units)
    require(
        fused_config(base, adapter) == fused,
        f"a model with hidden_size={fused.hidden_size}, head_dim={fused.head_dim} was not fused"
        f" from {adapter}.",
    )
    return base


def live_layers(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, dict[str, Sequence[int]]]:
    """Kernel -> block name -> the layers where the block can change the model's output.

    The residual state is zero until a kernel writes it, so a block that reads it earlier is dead.
    So is a block that writes it after the last reader. Head dims and MLP units are written and
    read within their layer. LoRA's blocks are live in the layers of `layers_to_transform`.
    """
    blocks = resolve_adapter(config, adapter).blocks

    def stages(end: int, block: str) -> list[int]:
        """The stages of the kernels whose `block` reads (end 0) or writes (1) the state."""
        return [
            _STAGE[k] for k, b in blocks.items() if KERNELS[k][end] == "residual" and block in b
        ]

    first_writer = min(stages(1, "forward"), default=len(PACKED))
    last_reader = max(stages(0, "backward"), default=-1)

    def live(kernel: str, block: str) -> Sequence[int]:
        if adapter.layers_to_transform is not None:
            return adapter.layers_to_transform
        reads, writes = (stream == "residual" for stream in KERNELS[kernel])
        early = reads and block in ("backward", "cross") and _STAGE[kernel] < first_writer
        late = writes and block in ("forward", "cross") and _STAGE[kernel] > last_reader
        return range(int(early), config.num_layers - int(late))

    return {
        kernel: {block: live(kernel, block) for block in names} for kernel, names in blocks.items()
    }


def adapter_shapes(config: LlamaConfig, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the leaves of the `adapters` collection, named and stacked as the base's
    parameters are ("layers/attn/q/forward": [L, ...]). For "full" they are those parameters.
    """
    if METHODS[adapter.method].in_place == "full":
        return param_shapes(config)
    layer = {
        f"{group(k)}/{k}/{name}": shape
        for k, blocks in resolve_adapter(config, adapter).blocks.items()
        for name, shape in blocks.items()
    }
    count = config.num_layers
    if config.execution.scan_layers:
        return {f"layers/{name}": (count, *shape) for name, shape in layer.items()}
    return {f"layers_{i}/{name}": shape for i in range(count) for name, shape in layer.items()}


def check_collection(
    config: LlamaConfig, adapter: AdapterConfig | None, given: Mapping[str, Any] | None
) -> None:
    """Raises ValueError unless `given`, an `adapters` collection or None, fits `adapter`."""
    if (adapter is None) != (given is None):
        raise ValueError(
            "Llama(config, adapter) needs apply({'params': ..., 'adapters': ...}, tokens), and"
            f" Llama(config) no adapters; got adapter={adapter} and"
            f" {'no' if given is None else 'an'} `adapters` collection."
        )
    if adapter is not None and given is not None:
        check_adapters(given, config, adapter, finite=False)


def check_adapters(
    adapters: Mapping[str, Any], config: LlamaConfig, adapter: AdapterConfig, finite: bool = True
) -> None:
    """Raises ValueError unless leaves and shapes are the method's and, if asked, finite."""
    shapes = adapter_shapes(config, adapter).items()
    wanted = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes}
    trees.check_like(adapters, wanted, f"adapters of method {adapter.method!r}", finite)
