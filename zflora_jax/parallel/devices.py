"""The widest attention head that cuDNN takes on the process's default device."""

from __future__ import annotations

import jax.extend.backend


def widest_head() -> int:
    """The widest head, in channels, that cuDNN's attention takes forward and backward on the
    default device; 0 where there is no such kernel.
    """
    backend = jax.extend.backend.get_backend()
    if "cuda" not in backend.platform_version:
        return 0
    major, minor = (int(part) for part in backend.local_devices()[0].compute_capability.split("."))
    return widest_cudnn_head((major, minor), _cudnn_version())


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


def _cudnn_version() -> int:
    """The version of cuDNN that jax has loaded; jax has no public name for it."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo

        return int(fused_attention_stablehlo.check_cudnn_version())
    except (ImportError, AttributeError, RuntimeError):
        return 0
