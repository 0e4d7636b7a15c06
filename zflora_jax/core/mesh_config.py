"""The mesh of a run: how many devices each of its axes has."""

from __future__ import annotations

from dataclasses import dataclass

from zflora_jax.core.fields import check_types, require, require_at_least


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis of the mesh has. The numbers of a run do not depend on it, up to
    float rounding.
    """

    data: int = 1
    """Copies of the model, each with its own rows of the batch."""
    fsdp: int = 1
    """Devices that the rows of the batch and the weights are divided over."""
    tensor: int = 1
    """Devices that heads, MLP units and the vocabulary are divided over."""
    slices: int = 1
    """Slices of devices that the copies of the model are spread over, equally many on each: TPU
    slices, or else groups of hosts. Between slices, over the data centre's network (DCN), training
    sends the sums of the adapter's gradients alone."""

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        require_at_least(1, self, "data", "fsdp", "tensor", "slices", section="mesh")
        require(
            self.data % self.slices == 0,
            f"mesh.data={self.data} is not a multiple of mesh.slices={self.slices}: every slice"
            f" holds as many copies of the model. Raise mesh.data, or lower mesh.slices.",
        )

    @property
    def devices(self) -> int:
        """How many devices the mesh has."""
        return self.data * self.fsdp * self.tensor

    @property
    def row_parts(self) -> int:
        """Over how many parts the rows of a batch are divided."""
        return self.data * self.fsdp
