"""Order of the devices of a mesh: those of a slice are neighbours along every axis but data.

A slice is a group of devices with fast links (a TPU slice and its ICI). Slices are connected by the
slower network of the data centre (DCN).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from zflora_jax.core.fields import require
from zflora_jax.core.run_config import MeshConfig

log = logging.getLogger(__name__)


def slice_groups(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """The devices of each slice, by `slice_index` of TPUs, otherwise by neighbouring processes.

    Returns:
      The groups in order; fewer or more than `slices` if the devices are not in that many.
    """
    for attribute in ("slice_index", "process_index"):
        found: dict[int, list[Any]] = {}
        for device in devices:
            found.setdefault(getattr(device, attribute, None) or 0, []).append(device)
        groups = [found[index] for index in sorted(found)]
        if len(groups) > 1:
            break
    each = len(groups) // slices
    if attribute == "slice_index" or each * slices != len(groups):
        return groups
    return [list(chain(*groups[i : i + each])) for i in range(0, len(groups), each)]


def arrange(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Arranges the devices of a mesh.

    Args:
      config: The sizes of the axes.
      devices: As many devices as the mesh has.

    Returns:
      Devices [data, fsdp, tensor]; slices follow each other along data.

    Raises:
      ConfigError: The devices are not in mesh.slices slices of equal size.
    """
    shape = (config.data // config.slices, config.fsdp, config.tensor)
    if config.slices == 1:
        count = len({getattr(device, "slice_index", None) for device in devices})
        if count > 1:
            log.warning(
                "the devices are in %d slices, and mesh.slices is 1: weights may be gathered over"
                " the network between them. Set mesh.slices=%d, and mesh.data to a multiple of it",
                *(count, count),
            )
            return np.asarray(devices).reshape(shape)
        return _neighbours(shape, devices)
    groups = slice_groups(devices, config.slices)
    require(
        len(groups) == config.slices and len({len(group) for group in groups}) == 1,
        f"mesh.slices={config.slices}: the {len(devices)} devices of the mesh are in groups of"
        f" {', '.join(str(len(group)) for group in groups)} (TPU slices, or else processes). Set"
        " mesh.slices to their number, or to 1 where all links are equally fast, and mesh.data,"
        " mesh.fsdp and mesh.tensor to use all devices.",
    )
    return np.concatenate([_neighbours(shape, group) for group in groups])


def _neighbours(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices of `shape`, linked along each axis where the torus allows it; in the given order if
    they fill no box of it.
    """
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError):
        return np.asarray(devices).reshape(shape)
