"""The device that a program is made for, and the widest attention head that cuDNN takes there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.backend

# Part of what jax calls a GPU -> its compute capability, which an absent one does not tell itself.
# The first part that its device kind contains counts.
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
    """What programs are made for.

    Attributes:
      platform: "tpu", "gpu" (NVIDIA's alone) or "cpu"; another as jax names it.
      kind: as jax names it, "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      capability: a GPU's compute capability, (9, 0) for Hopper; None of others, and where an absent
        GPU is not known.
      here: whether this process has such a device.
    """

    platform: str
    kind: str
    capability: tuple[int, int] | None = None
    here: bool = True


def device_in_use() -> Device:
    """The device of the mesh in use (`jax.set_mesh`), which may be absent (a program is compiled
    for it, not run); else the default device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    wanted: Any = None if mesh.empty else mesh.abstract_device
    backend = jax.extend.backend.get_backend()
    here = _default_device(backend)
    if wanted is not None and wanted.device_kind != here.device_kind:
        return named_device(wanted.platform, wanted.device_kind)
    platform, capability = here.platform, None
    if platform == "gpu" and "cuda" in backend.platform_version:
        capability = _capability(here.compute_capability)
    elif platform == "gpu":
        platform = "rocm"
    return Device(platform, here.device_kind, capability)


def named_device(platform: str, kind: str) -> Device:
    """An absent device.

    Args:
      platform: "tpu" or "gpu", as jax names it.
      kind: as jax names the device.
    """
    known = (GPUS[part] for part in GPUS if platform == "gpu" and part in kind)
    return Device(platform, kind, next(known, None), here=False)


def widest_head() -> int:
    """The widest head, in channels, that cuDNN's attention takes forward and backward on the
    device in use; 0 where there is no such kernel.
    """
    device = device_in_use()
    if device.capability is None:
        return 0
    version = _cudnn_version() if device.here else ASSUMED_CUDNN
    return widest_cudnn_head(device.capability, version)


def widest_cudnn_head(capability: tuple[int, int], cudnn: int) -> int:
    """The widest head, in channels, of 16-bit attention forward and backward; 0 for none.

    Narrower than what jax lets through (256 since Hopper, 128 since Ampere; nothing on 10.3 before
    cuDNN 9.11): by cuDNN's table of support the backward pass of Blackwell has 128, as Ampere's and
    Ada's have (and 256 itself in its newest releases), and Hopper's has 256 since cuDNN 9.5.

    Args:
      capability: the GPU's compute capability, (9, 0) for Hopper.
      cudnn: the library's version, 91100 for 9.11.0; 0 where it is not known.
    """
    if capability < (8, 0) or (capability == (10, 3) and cudnn < 91100):
        return 0
    return 256 if capability[0] == 9 and cudnn >= 90500 else 128


def allow_absent_cudnn() -> None:
    """Let jax trace cuDNN's attention for the absent GPU of the mesh in use: jax asks the library
    and the first GPU of this process what they take, and has no public way to tell it. Where the
    device in use is here, it still asks them.
    """
    if device_in_use().here:
        return
    from jax._src.cudnn import fused_attention_stablehlo as theirs

    if hasattr(theirs.check_cudnn_version, "knows_absent"):
        return
    version, at_least, equal = (
        theirs.check_cudnn_version,
        theirs.check_compute_capability,
        theirs.is_cuda_compute_capability_equal,
    )

    def absent() -> tuple[int, int] | None:
        device = device_in_use()
        return None if device.here else device.capability

    def check_cudnn_version() -> int:
        return ASSUMED_CUDNN if absent() else int(version())

    def check_compute_capability(wanted: str) -> bool:
        have = absent()
        return have >= _capability(wanted) if have else bool(at_least(wanted))

    def is_cuda_compute_capability_equal(wanted: str) -> bool:
        have = absent()
        return have == _capability(wanted) if have else bool(equal(wanted))

    check_cudnn_version.knows_absent = True  # type: ignore[attr-defined]
    for function in (
        check_cudnn_version,
        check_compute_capability,
        is_cuda_compute_capability_equal,
    ):
        setattr(theirs, function.__name__, function)


def on_cpu() -> AbstractContextManager[None]:
    """A context in which arrays are made on the host's CPU, for results that must not depend on the
    device; on the default device where JAX_PLATFORMS leaves the CPU out.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return nullcontext()
    return jax.default_device(cpu)


def _default_device(backend: Any) -> Any:
    """jax's default device: as set, else the first of the backend."""
    given: Any = getattr(jax.config, "jax_default_device", None)
    if isinstance(given, str):
        return jax.local_devices(backend=given)[0]
    return given or backend.local_devices()[0]


def _capability(text: str) -> tuple[int, int]:
    major, minor = (int(part) for part in text.split("."))
    return major, minor


def _cudnn_version() -> int:
    """The version of cuDNN that jax has loaded; jax has no public name for it."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo

        return int(fused_attention_stablehlo.check_cudnn_version())
    except (ImportError, AttributeError, RuntimeError):
        return 0
