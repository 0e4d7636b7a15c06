"""The device that a program is made for, and cuDNN's widest attention head there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.backend

# Part of jax's name of a GPU -> its compute capability, which an absent one cannot report. The
# first part that the name contains counts.
GPUS = {
    "GH200": (9, 0),
    "H200": (9, 0),
    "H100": (9, 0),
    "B200": (10, 0),
    "B300": (10, 3),
    "L40": (8, 9),
    "L4": (8, 9),
    "A100": (8, 0),
    "A10": (8, 6),
}
ASSUMED_CUDNN = 91100  # of an absent GPU; jax 0.10 ships with a newer one


@dataclass(frozen=True)
class Device:
    """The device that programs are made for."""

    platform: str  # "tpu", "gpu" (NVIDIA's only) or "cpu"; another as jax names it
    kind: str  # jax's name: "TPU v5 lite", "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] | None = None  # a GPU's, (9, 0) for Hopper; None if unknown
    here: bool = True  # whether this process has such a device


def device_in_use() -> Device:
    """The device of the mesh in use, which may be absent; without a mesh, the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    wanted: Any = None if mesh.empty else mesh.abstract_device
    backend = jax.extend.backend.get_backend()
    given: Any = getattr(jax.config, "jax_default_device", None)
    if isinstance(given, str):
        given = jax.local_devices(backend=given)[0]
    here: Any = given or backend.local_devices()[0]
    if wanted is not None and wanted.device_kind != here.device_kind:
        return named_device(wanted.platform, wanted.device_kind)
    if here.platform != "gpu":
        return Device(here.platform, here.device_kind)
    if "cuda" not in backend.platform_version:
        return Device("rocm", here.device_kind)
    return Device("gpu", here.device_kind, _capability(here.compute_capability))


def named_device(platform: str, kind: str) -> Device:
    """A "tpu" or "gpu" that this process does not have. kind: jax's name of it."""
    known = (GPUS[part] for part in GPUS if platform == "gpu" and part in kind)
    return Device(platform, kind, next(known, None), here=False)


def widest_head() -> int:
    """The widest head, in channels, of cuDNN's 16-bit attention forward and backward on the device
    in use; 0 if it has none. This is narrower than jax's check: in cuDNN's table of support, the
    backward pass allows 256 only on Hopper.
    """
    capability = device_in_use().capability
    if capability is None or capability < (8, 0):
        return 0
    return 256 if capability[0] == 9 else 128


def allow_absent_cudnn() -> None:
    """Lets jax trace cuDNN's attention for the absent GPU of the mesh in use. jax asks the library
    and the first GPU of this process for their limits, and has no public way to override them.
    """
    if device_in_use().here:
        return
    from jax._src.cudnn import fused_attention_stablehlo as theirs

    if hasattr(theirs.check_cudnn_version, "knows_absent"):
        return

    def replace(name: str, of_absent: Callable[..., Any]) -> None:
        original = getattr(theirs, name)

        def answer(*wanted: Any) -> Any:
            device = device_in_use()
            if device.here or device.capability is None:
                return original(*wanted)
            return of_absent(device.capability, *wanted)

        answer.knows_absent = True  # type: ignore[attr-defined]
        setattr(theirs, name, answer)

    replace("check_cudnn_version", lambda have: ASSUMED_CUDNN)
    replace("check_compute_capability", lambda have, wanted: have >= _capability(wanted))
    replace("is_cuda_compute_capability_equal", lambda have, wanted: have == _capability(wanted))


def on_cpu() -> AbstractContextManager[None]:
    """A context that makes arrays on the host's CPU, for results that must not depend on the
    device; on the default device if JAX_PLATFORMS leaves the CPU out.
    """
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return nullcontext()


def _capability(text: str) -> tuple[int, int]:
    major, minor = (int(part) for part in text.split("."))
    return major, minor
