"""Tasks of one base: exports, slices, and ranks of a vLLM that is none."""

import json
import types

import torch
from safetensors.torch import load_file

import zflora_jax as zf
from support.exports import perturbed_adapters
from zflora_vllm.worker import Tasks

LAYERS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def save_tasks(folder, adapter, base, eps_z=2**-4, dtype="float32", **tasks):
    """NAME/ and NAME.safetensors of each task, a standard deviation of its adapter."""
    for name, std in tasks.items():
        fused = zf.fuse(base, adapter, perturbed_adapters(base, adapter, std))
        zf.save_hf(folder / name, fused, eps_z=eps_z, dtype=dtype)
        zf.save_slices(folder / f"{name}.safetensors", fused, eps_z=eps_z, dtype=dtype)
    return fused


def local(tensors, layer, ranks, rank, copies=1):
    """The weight of a rank, as vLLM divides it."""
    at, _, kind = layer.rpartition(".")
    if kind in ("o_proj", "down_proj"):
        return tensors[f"{layer}.weight"].chunk(ranks, 1)[rank]
    names = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    held = []
    for name in names[kind]:
        share = copies if name in ("k_proj", "v_proj") else 1
        held.append(tensors[f"{at}.{name}.weight"].chunk(ranks // share)[rank // share])
    return torch.cat(held)


def weights(export, rank, ranks=2):
    """Layer -> the weight of a rank."""
    tensors = load_file(export / "model.safetensors")
    layers = [f"model.layers.{i}.{name}" for i in range(2) for name in LAYERS]
    return {layer: local(tensors, layer, ranks, rank) for layer in layers}


class Rank(Tasks):
    """A worker of vLLM as far as `Tasks` knows it."""

    def __init__(self, export, rank, ranks=2):
        config = types.SimpleNamespace(**json.loads((export / "config.json").read_text()))
        self.weights = {name: x.clone() for name, x in weights(export, rank, ranks).items()}
        layers = []
        for name, x in self.weights.items():
            parameter = types.SimpleNamespace(data=x)
            layers.append(
                (name, types.SimpleNamespace(weight=parameter, tp_rank=rank, tp_size=ranks))
            )
        self.model_runner = types.SimpleNamespace(
            model_config=types.SimpleNamespace(model=str(export), hf_config=config),
            model=types.SimpleNamespace(named_modules=lambda: layers),
        )
