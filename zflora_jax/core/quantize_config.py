"""Storage of the base's kernels: as floats, or as codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from zflora_jax.core.fields import Bounds, check_types, checked_names, require

# "none": floats of the run's dtype; "keep": the codes of a GGUF file; else a row of
# `ops.quantized.KINDS`.
Stored = Literal["none", "keep", "int8", "int4", "nf4", "q8_0", "q4_0", "q4_1"]
STORED: tuple[str, ...] = get_args(Stored)
Group = Annotated[int, Bounds("0, 32, 64 or 128 inputs", lambda x: x in (0, 32, 64, 128))]


@checked_names
@dataclass(frozen=True)
class QuantizeConfig:
    """Storage types of the base. Quantised weights are frozen: adapters train next to them."""

    kernels: Stored = "none"
    """Storage type of the layers' kernels. none: floats of train.dtype; int8: one scale for each
    output; int4, nf4: 4 bits in groups of inputs; q8_0, q4_0, q4_1: blocks of GGUF; keep: the
    blocks that a GGUF file has, if their type is one of these three."""
    group: Group | None = None
    """Inputs that share a scale: 32, 64 or 128, 0 for all (only int8). None means 64, and all for
    int8; GGUF's blocks have 32."""
    embedding: Stored = "none"
    """Storage type of the embedding, and of an output head tied to it."""
    head: Stored = "none"
    """Storage type of an output head that is not tied."""

    def __post_init__(self) -> None:
        check_types(self, "quantize")
        if self.group is None:
            return
        kinds = {name: getattr(self, name) for name in ("kernels", "embedding", "head")}
        chosen = {name: kind for name, kind in kinds.items() if kind in ("int8", "int4", "nf4")}
        require(
            bool(chosen),
            f"quantize.group={self.group} is for int8, int4 and nf4, and neither quantize.kernels,"
            " quantize.embedding nor quantize.head is one of them: leave it out.",
        )
        few = [f"quantize.{name}={kind}" for name, kind in chosen.items() if kind != "int8"]
        require(
            self.group != 0 or not few,
            f"quantize.group=0, one scale for all inputs, is only for int8, and {few[:1]} needs"
            " groups of 32, 64 or 128; one group size serves all three settings.",
        )

    @property
    def active(self) -> bool:
        """True if anything is stored as codes."""
        return {self.kernels, self.embedding, self.head} != {"none"}


def quantize_config(given: QuantizeConfig | str | None) -> QuantizeConfig:
    """The settings for a short name: "keep" keeps all codes of a file, another type is for the
    kernels; None quantises nothing.
    """
    if given is None:
        return QuantizeConfig()
    if isinstance(given, QuantizeConfig):
        return given
    if given == "keep":
        return QuantizeConfig("keep", embedding="keep", head="keep")
    return QuantizeConfig(given)  # type: ignore[arg-type]
