"""Linear layers with unpacked weights on CPUs (`--quantization zflora`), where vLLM otherwise packs
weights into kernels that cannot be written to. GPUs do not need this.
"""

from __future__ import annotations

from typing import Any

import torch


def register() -> None:
    """Makes the quantization "zflora" known to vLLM, which calls this in every process."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class PlainLinear(UnquantizedLinearMethod):
        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    @register_quantization_config("zflora")
    class Plain(QuantizationConfig):
        """Unpacked floats."""

        def get_name(self) -> str:
            return "zflora"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float32, torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Plain:
            return cls()

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            return PlainLinear() if isinstance(layer, LinearBase) else None
