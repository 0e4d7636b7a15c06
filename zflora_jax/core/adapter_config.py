"""Settings of an adapter: the table of methods, and an adapter's widths, targets and start."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from zflora_jax.core.fields import (
    Bounds,
    ConfigError,
    Count,
    Natural,
    Positive,
    Share,
    check_types,
    checked_names,
    require,
    require_in,
)

# How random blocks are drawn, or the part of the base that LoRA starts as.
Start = Literal["kaiming_uniform", "normal", "pissa", "olora"]
OF_BASE = ("pissa", "olora")
_EACH_ONCE = Bounds(
    "layers from 0, each once, e.g. [0, 1]", lambda x: len(x) == len({*x}) > 0 and min(x) >= 0
)
Layers = Annotated[tuple[int, ...], _EACH_ONCE]


@dataclass(frozen=True)
class Method:
    """One row of the table in docs/method.md.

    Attributes:
      residual, heads, mlp: Whether the stream can be widened.
      units: Whether the MLP is widened by default.
      in_place: The change made to kernels instead; "own": `kernel` makes it.
      start: Distribution of the random blocks; None: nothing is random.
      source: Publication that it reconstructs; exports name it.
      kernel: Class that adapts a kernel (`add_method`).
    """

    residual: bool = False
    heads: bool = False
    mlp: bool = False
    units: bool = True
    in_place: Literal["none", "lora", "ffa", "full", "own"] = "none"
    start: Start | None = "normal"
    source: str = ""
    kernel: Any = None

    @property
    def widens(self) -> bool:
        """True if it adds channels next to the base kernels, instead of changing them in place."""
        return self.in_place == "none"

    @property
    def keeps_codes(self) -> bool:
        """True if a quantised base stays quantised when it is fused."""
        return self.widens or (self.kernel is not None and self.kernel.fuses_codes)


_FLORA, _ZFLORA = "FLoRA (arXiv 2511.00050)", "zFLoRA (arXiv 2510.25784)"

METHODS: dict[str, Method] = {
    "lora": Method(in_place="lora", start="kaiming_uniform"),
    "ffa": Method(in_place="ffa", start=None),
    "ffba": Method(heads=True, mlp=True, source=_FLORA),
    "zflora-minimal": Method(residual=True, mlp=True, units=False, source=_ZFLORA),
    "zflora-uniform": Method(residual=True, heads=True, mlp=True, source=_ZFLORA),
    "full": Method(in_place="full", start=None),
}

_LORA = ("dropout", "use_dora", "layers_to_transform", "rank_pattern", "alpha_pattern")
_OF_METHODS: dict[str, Callable[[Method], bool]] = {
    "extra_mlp_units": lambda row: row.mlp,
    "extra_head_dim": lambda row: row.heads,
    "head_scores": lambda row: row.heads,
    "init": lambda row: row.start is not None,
    **dict.fromkeys(_LORA, lambda row: row.in_place == "lora"),
}
"""Setting of some methods -> whether a method has it."""


@checked_names
@dataclass(frozen=True)
class AdapterConfig:
    """An adapter: a method, its widths in channels, and the kernels that it may touch."""

    method: str
    """A row of the table in docs/method.md; full is full fine-tuning."""
    rank: Count = 16
    """r: the rank of lora and ffa, the width of the residual state of the zflora methods, and the
    divisor of the scale s = alpha / rank (see use_rslora)."""
    alpha: Positive | None = None
    """The numerator of the scale; None means 2 * rank, so s = 2."""
    targets: str = "all"
    """Kernels that may change (PEFT's target_modules): all, attention, mlp, or a regex that matches
    whole kernel names (q, k, v, o, gate, up, down)."""
    extra_mlp_units: Natural | None = None
    """m: MLP units that are added; None means rank, for zflora-minimal 0. Only for methods that can
    widen the MLP."""
    extra_head_dim: Natural | None = None
    """e: even number of dims that are added to each head; None means up to the next head size that
    attention kernels of servers know. Only for methods that widen the heads."""
    head_scores: bool = True
    """Widen q and k too, which adds a score term; False widens only v and o. False is only for
    methods that widen heads."""
    init: Start | None = None
    """Distribution of the random blocks: kaiming_uniform, within +-1/sqrt(inputs), as PEFT starts
    LoRA, or normal, N(0, 1/inputs). None means kaiming_uniform for lora and normal for others
    that draw. lora may also start as a part that is removed from the base: pissa (arXiv
    2404.02948), by singular values, or olora (2406.01775), by QR."""
    dropout: Share = 0.0
    """Share of the inputs of LoRA's A that a training step drops (PEFT's lora_dropout); the others
    are divided by 1 - dropout. Only for lora."""
    use_rslora: bool = False
    """Divide alpha by the square root of rank instead, so that the scale suits high ranks (rsLoRA,
    arXiv 2312.03732). It needs an alpha."""
    use_dora: bool = False
    """Train the norm of every column of the adapted kernel, too (DoRA, arXiv 2402.09353). Only for
    lora, of all layers."""
    layers_to_transform: Layers | None = None
    """Layers that have an adapter, from 0; None means all. Only for lora."""
    rank_pattern: tuple[tuple[str, int], ...] = ()
    """Other ranks for some kernels: pairs of a regex that matches whole kernel names and a rank,
    e.g. [["q|v", 8]]; the first match counts. Only for lora."""
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    """Other alphas for some kernels, in the same form. Only for lora."""

    def __post_init__(self) -> None:
        check_types(self, "adapter")
        require_in(METHODS, self.method, f"unknown adapter method {self.method!r}")
        require(
            not self.use_rslora or self.alpha is not None,
            "adapter.use_rslora=True: give adapter.alpha too, e.g. 16; the scale is then alpha /"
            " sqrt(rank).",
        )
        for name, has in _OF_METHODS.items():
            value, fits = getattr(self, name), [key for key, row in METHODS.items() if has(row)]
            require(
                self.method in fits or value == getattr(AdapterConfig, name),
                f"adapter.{name}={value!r}: method {self.method!r} does not have it, only"
                f" {', '.join(fits)}. Leave it unset.",
            )
        require(
            self.init not in OF_BASE or self.method == "lora",
            f"adapter.init={self.init!r}: only method lora can start as a part of the base.",
        )
        require(
            (self.extra_head_dim or 0) % 2 == 0,
            f"adapter.extra_head_dim={self.extra_head_dim} is odd: Hugging Face rotates head"
            " dims in half-split pairs, so use an even width.",
        )
        require(
            self.layers_to_transform is None or not self.use_dora,
            "adapter.use_dora=True is for all layers; leave layers_to_transform unset.",
        )
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, name):
                require(value > 0, f"adapter.{name}: {value} for {pattern!r} must be above 0.")
                try:
                    re.compile(pattern)
                except (re.error, OverflowError, RecursionError) as error:
                    raise ConfigError(
                        f"adapter.{name}: {pattern!r} is not a valid regex ({error})."
                    ) from None

    def rank_of(self, kernel: str) -> int:
        """r of a kernel."""
        return _first(self.rank_pattern, kernel, self.rank)

    def scale_of(self, kernel: str) -> float:
        """s of a kernel."""
        alpha = _first(self.alpha_pattern, kernel, self.alpha)
        return 2.0 if alpha is None else alpha / self.divisor_of(self.rank_of(kernel))

    @property
    def scale(self) -> float:
        """s = alpha / rank, or with use_rslora alpha / sqrt(rank)."""
        return 2.0 if self.alpha is None else self.alpha / self.divisor_of(self.rank)

    def divisor_of(self, rank: int) -> float:
        """The divisor of alpha at a rank."""
        return math.sqrt(rank) if self.use_rslora else float(rank)

    def explicit(self) -> AdapterConfig:
        """The config with the method's default for an unset `init`."""
        return self.replace(init=self.init or METHODS[self.method].start)

    def replace(self, **changes: Any) -> AdapterConfig:
        """Returns a copy with other values of fields."""
        return dataclasses.replace(self, **changes)


def _first(table: tuple[tuple[str, Any], ...], kernel: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches a kernel's whole name."""
    return next((x for pattern, x in table if re.fullmatch(pattern, kernel)), otherwise)
