"""TPUs and GPUs to compile for; none has to be there, and nothing runs on them.

TPU compilers come with libtpu, NVIDIA's with jax's CUDA plugin.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import jax

from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.core.libtpu import ABSENT

GIB, TERA, GIGA = 2**30, 10**12, 10**9


@dataclass(frozen=True)
class Chip:
    """Published data of one device."""

    memory: int  # bytes of HBM that a program can use, as the compiler reports it
    flops: float  # dense bfloat16 operations per second
    bandwidth: float  # bytes per second from HBM
    link: float  # bytes per second to its neighbours, all links together, one way
    clock: float  # matrix units' rate in Hz; 0 if the compiler estimates no cycles
    topologies: tuple[str, ...]  # shapes of one slice of TPUs, or numbers of GPUs in one machine
    compiler_config: str = ""  # XLA's description of an absent GPU, a GpuTargetConfigProto


_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")

_H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 11 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Rates: cloud.google.com/tpu/docs/v5e, v5p, v6e; NVIDIA's H100 datasheet (SXM).
CHIPS = {
    "tpu:v5e": Chip(int(15.75 * GIB), 197 * TERA, 819 * GIGA, 200 * GIGA, 1.5e9, _SQUARES),
    "tpu:v5p": Chip(int(95.74 * GIB), 459 * TERA, 2765 * GIGA, 600 * GIGA, 1.75e9, _CUBES),
    "tpu:v6e": Chip(int(31.25 * GIB), 918 * TERA, 1640 * GIGA, 400 * GIGA, 1.75e9, _SQUARES),
    "cuda:h100": Chip(
        84978434048, 989 * TERA, 3352 * GIGA, 450 * GIGA, 0.0, ("1", "2", "4", "8"), _H100
    ),
}

# jax's name of a device -> its row of CHIPS. An H200 computes like an H100.
_KINDS = {
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), "tpu:v5e"),
    **dict.fromkeys(("TPU v5", "TPU v5p"), "tpu:v5p"),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), "tpu:v6e"),
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), "cuda:h100"),
}


def peak_flops(device_kind: str) -> float | None:
    """Published dense bfloat16 operations per second of a device type; None if unknown."""
    return CHIPS[_KINDS[device_kind]].flops if device_kind in _KINDS else None


# Platform -> the compiler's module, and this package's extra that installs it.
_COMPILERS = {"tpu": ("libtpu", "target-tpu"), "cuda": ("jax_cuda13_plugin", "target-cuda")}

# Without these libtpu asks the network for its place and loads only in one process.
_LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **ABSENT}


@dataclass(frozen=True)
class Target:
    """Devices to compile for: a key of `CHIPS`, and one of its topologies."""

    kind: str
    topology: str

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.topology}"

    @property
    def platform(self) -> str:
        return self.kind.partition(":")[0]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    def devices(self) -> list[Any]:
        """Returns the devices, for the Mesh of programs to compile; ConfigError if the compiler is
        not installed.
        """
        module, extra = _COMPILERS[self.platform]
        require(
            importlib.util.find_spec(module) is not None,
            f"target {self.name!r} needs the compiler of package {module!r}, which is not"
            f" installed: pip install '.[{extra}]' in a clone. No device is needed.",
        )
        return _devices(self)


def target(name: str) -> Target:
    """Returns the target of a name: tpu:v5e:2x4, tpu:v5p:2x2x1, cuda:h100, cuda:h100:8.

    Raises:
      ConfigError: There is no such chip or topology; the message lists those that exist.
    """
    kind, _, topology = name.rpartition(":")
    if name in CHIPS:
        kind, topology = name, CHIPS[name].topologies[0]
    if kind not in CHIPS:
        hint = nearest(topology if kind in ("", "tpu") else kind, CHIPS)
        raise ConfigError(f"unknown target {name!r}: {hint}, with a topology as in tpu:v5e:2x4.")
    exist = ", ".join(CHIPS[kind].topologies)
    found = topology in CHIPS[kind].topologies
    require(found, f"unknown topology {topology!r} of {kind}: choose from {exist}.")
    return Target(kind, topology)


@functools.cache
def _devices(where: Target) -> list[Any]:
    from jax.experimental import topologies

    _, _, name = where.kind.partition(":")
    given: dict[str, Any] = {}
    if where.platform == "cuda":
        # jax would look for CUDA's libraries, which compiling does not need.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        config = where.chip.compiler_config
        given = {"target_config": config, "topology": f"1x1x{where.topology}"}
    else:
        os.environ.update(_LIBTPU | os.environ)
        name = f"{name}:{where.topology}"
        if where.topology == "1x1":  # a host has four by default
            given["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(name, where.platform, **given).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise ConfigError(f"the compiler for {where.name} does not start: {error}") from None
