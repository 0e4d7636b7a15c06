"""Extends each worker of vLLM: it keeps tasks, and writes one into its kernels
(`--worker-extension-cls zflora_vllm.worker.Tasks`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zflora_vllm.slices import Slices, SlicesError, Write, parts, read_slices, require_same, writes

OWN = ""  # the task of the export that is served
BASE = "base"  # the task that computes the base
KERNELS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class Tasks:
    """Mixed into vLLM's worker. Names begin with zflora, to differ from vLLM's attributes. Methods
    return "" or an error message, because an exception of one rank would end the engine.
    """

    def zflora_load(self, name: str, file: str, sha256: str) -> str:
        """Reads a task from a file, and checks it against the export and every weight. It writes
        nothing.
        """
        what = Path(file).name
        try:
            slices = read_slices(Path(file).read_bytes(), what)
            if slices.facts["sha256"] != sha256:
                raise SlicesError(f"{what} has changed while it was loaded: load it again.")
            config = self.model_runner.model_config  # type: ignore[attr-defined]
            require_same(slices.facts, export_facts(Path(config.model)), what, config.model)
            tasks = self.__dict__.setdefault("zflora_tasks", {})
            made = self._zflora_writes(slices)
            if OWN not in tasks:  # the current values
                own = [(weight, write.kept(weight)) for weight, write in made]
                tasks |= {OWN: own, BASE: self._zflora_writes(slices.idle())}
            tasks[name] = made
        except SlicesError as error:
            return str(error)
        except Exception as error:
            return f"{what}: {error!r}"
        return ""

    def zflora_use(self, name: str) -> str:
        """Writes a task that was loaded."""
        try:
            for weight, write in self.__dict__["zflora_tasks"][name]:
                write.into(weight)
        except Exception as error:
            return repr(error)
        return ""

    def zflora_unload(self, name: str) -> str:
        """Forgets a task."""
        self.__dict__.get("zflora_tasks", {}).pop(name, None)
        return ""

    def _zflora_writes(self, slices: Slices) -> list[tuple[torch.Tensor, Write]]:
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        sizes = export_sizes(runner.model_config.hf_config)
        found, seen = [], set[str]()
        for name, layer in runner.model.named_modules():
            if name.rpartition(".")[2] not in KERNELS:
                continue
            weight = layer.weight.data
            held = parts(name, sizes, layer.tp_rank, layer.tp_size)
            shape = (held[-1].start + len(held[-1].rows), len(held[0].columns))
            if tuple(weight.shape) != shape:
                raise SlicesError(
                    f"{name} holds a weight {tuple(weight.shape)}, and {shape} was expected. On a"
                    " CPU start vLLM with --quantization zflora, which leaves weights unpacked;"
                    " quantised exports are not switched."
                )
            for part in held:
                if part.tensor not in slices.rows:
                    raise SlicesError(
                        f"the slices have no {part.tensor}: models that store kernels joined are"
                        " not switched."
                    )
                found += [(weight, write) for write in writes(slices, part)]
                seen.add(part.tensor)
        if lacking := sorted(slices.rows.keys() - seen):
            raise SlicesError(
                f"this rank has no layer for {', '.join(lacking[:3])} and others: servers with"
                " pipeline parallel ranks are not switched."
            )
        return found


def export_facts(directory: Path) -> Mapping[str, Any]:
    """Returns the facts of the export in a directory that slices must agree with."""
    try:
        manifest = json.loads((directory / "zflora.json").read_text(encoding="utf-8"))
        native = manifest["native_config"]
        return {
            "method": manifest["adapter"]["method"],
            "dtype": manifest["dtype"],
            "eps_z": manifest["eps_z"],
            "widths": {n: native[n] for n in ("hidden_size", "head_dim", "intermediate_size")},
            "base": manifest["base"]["fingerprint"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SlicesError(
            f"{directory} is no fused export of zflora_jax with float kernels ({error!r}): serve"
            " one, so that tasks can be written into it."
        ) from None


def export_sizes(config: Any) -> dict[str, int]:
    """The sizes for `slices.parts` from the transformers config of a config.json."""
    return {
        "hidden": config.hidden_size,
        "mlp": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }
