"""Which attention kernel is chosen for a device, by its name in reports and in programs that are
lowered for it; what is known of devices, here or absent. That the kernels are right:
test_attention.py.
"""

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest

from zflora_jax.core.run_config import MeshConfig
from zflora_jax.ops import attention as attention_ops
from zflora_jax.ops.attention import attention, attention_choice
from zflora_jax.ops.attention_mask import AttentionMask
from zflora_jax.ops.remat import POLICIES
from zflora_jax.parallel import devices
from zflora_jax.parallel.devices import Device, device_in_use, named_device, widest_head
from zflora_jax.parallel.sharding import make_mesh

H100, A100, V5E = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "TPU v5 lite"
IDS = jnp.zeros((2, 256), jnp.int32)
PACKED, CAUSAL = AttentionMask(IDS, IDS), AttentionMask()
PADDED = AttentionMask(IDS == 0, IDS == 0)
AFTER = AttentionMask(None, jnp.ones((2, 300), bool), jnp.int32(44))


@pytest.fixture
def on(monkeypatch):
    """on(kind): as if the mesh in use were of this absent device."""

    def use(kind: str) -> None:
        platform = "tpu" if kind.startswith("TPU") else "gpu"
        for module in (attention_ops, devices):
            monkeypatch.setattr(module, "device_in_use", partial(named_device, platform, kind))

    return use


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "mask", "kernel", "reason"),
    [
        (V5E, (2, 256, 6, 64), "bfloat16", PACKED, "splash", ""),
        (V5E, (2, 256, 6, 80), "float32", CAUSAL, "splash", ""),
        (V5E, (2, 256, 6, 64), "float16", CAUSAL, "blocks", "no float16"),
        (V5E, (2, 100, 6, 64), "bfloat16", CAUSAL, "blocks", "less than one block of 128"),
        (V5E, (2, 256, 6, 264), "bfloat16", CAUSAL, "blocks", "wider than 256"),
        (V5E, (2, 1, 6, 64), "bfloat16", CAUSAL, "blocks", "one query a row"),
        (V5E, (2, 256, 6, 64), "bfloat16", AFTER, "blocks", "follow a cache"),
        (H100, (2, 63, 6, 80), "float16", CAUSAL, "cudnn", ""),
        (H100, (2, 64, 6, 248), "bfloat16", PADDED, "cudnn", ""),
        (H100, (2, 64, 6, 64), "bfloat16", PACKED, "blocks", "packed rows"),
        (H100, (2, 64, 6, 64), "float32", CAUSAL, "blocks", "no float32"),
        (H100, (2, 64, 6, 68), "bfloat16", CAUSAL, "blocks", "no multiple of 8"),
        (H100, (2, 1, 6, 64), "bfloat16", CAUSAL, "blocks", "one query a row"),
        (H100, (2, 256, 6, 64), "bfloat16", AFTER, "blocks", "follow a cache"),
        (A100, (2, 64, 6, 128), "bfloat16", PADDED, "cudnn", ""),
        (A100, (2, 64, 6, 136), "bfloat16", CAUSAL, "blocks", "wider than 128"),
        ("NVIDIA Unheard-of", (2, 64, 6, 64), "bfloat16", CAUSAL, "blocks", "wider than 0"),
    ],
)
def test_the_kernel_of_a_device(kind, shape, dtype, mask, kernel, reason, on):
    on(kind)
    name, why = attention_choice(shape, 2, dtype, mask)
    assert name == kernel
    assert reason in why and bool(why) == (kernel == "blocks")


def test_what_a_mesh_does_not_divide_takes_blocks(on):
    on(V5E)
    cube = MeshConfig(data=2, fsdp=2, tensor=2)
    for mesh, rows, reason in (
        (cube, 4, ""),
        (cube, 2, ""),
        (cube, 3, "does not divide 3 rows"),
        (MeshConfig(tensor=4), 2, "tensor=4 does not divide 2 key heads"),
    ):
        with jax.set_mesh(make_mesh(mesh)):
            name, why = attention_choice((rows, 256, 4, 64), 2, "bfloat16", PACKED)
        assert name == ("blocks" if reason else "splash") and reason in why


def test_this_machine_has_blocks():
    found = attention_choice((2, 256, 6, 64), 2, "bfloat16", CAUSAL)
    assert found == ("blocks", "no flash kernel for cpu")
    assert widest_head() == 0 and device_in_use().here


def lowered(kind: str, policy: Any, mask: AttentionMask) -> Counter[str]:
    """Kernels in the program of a loss and its gradients, lowered for the platform of `kind`."""
    names = ["tpu_custom_call", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]

    def layer(q, k, v):
        return jnp.sum(attention(q, k, v, mask, 0.125).astype(jnp.float32))

    loss = jax.checkpoint(layer, policy=policy) if policy != "none" else layer
    shapes = (2, 256, 4, 64), (2, 2, 64, 256), (2, 2, 256, 64)
    with jax.default_matmul_precision("highest"):  # which the TPU's compiler refuses in bfloat16
        text = jax.export.export(
            jax.jit(jax.value_and_grad(loss, (0, 1, 2))),
            platforms=["tpu" if kind == V5E else "cuda"],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in names],
        )(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)).mlir_module()
    assert "256x256" not in text  # neither scores nor a mask
    found = re.findall(r"kernel_name = .(splash_mqa_[a-z]+)|@(__cudnn.fmha\w+)\(", text)
    return Counter(splash or cudnn for splash, cudnn in found)


@pytest.mark.parametrize(
    ("kind", "mask"), [(V5E, PACKED), (V5E, CAUSAL), (V5E, PADDED), (H100, CAUSAL), (H100, PADDED)]
)
def test_kernels_are_called_for_by_name_and_run_forward_once(kind, mask, on):
    """A block of the model keeps what the backward kernels need: the forward kernel does not run
    again, unless all is computed again.
    """
    on(kind)
    forward, *backward = "splash_mqa_fwd", "splash_mqa_dkv", "splash_mqa_dq"
    if kind == H100:
        forward, backward = "__cudnn$fmhaSoftmax", ["__cudnn$fmhaSoftmaxBackward"]
    once = Counter([forward, *backward])
    assert lowered(kind, "none", mask) == once
    assert lowered(kind, POLICIES["dots"], mask) == once
    assert lowered(kind, None, mask) == once + Counter([forward])


def test_devices_are_known_by_their_kind():
    known = {H100: (9, 0), "NVIDIA GB200": (10, 0), A100: (8, 0), "NVIDIA L40S": (8, 9)}
    for kind, capability in (known | {V5E: None, "NVIDIA Unheard-of": None}).items():
        device = named_device("tpu" if kind == V5E else "gpu", kind)
        assert device.capability == capability and not device.here


@pytest.mark.parametrize(
    ("capability", "widest"),
    [((7, 5), 0), ((8, 0), 128), ((8, 9), 128), ((9, 0), 256), ((10, 0), 128), ((12, 0), 128)],
    ids=str,
)
def test_the_widest_head_of_a_gpu(capability, widest, monkeypatch):
    """Never wider than what jax itself lets through."""
    from jax._src.cudnn import fused_attention_stablehlo as theirs

    def parsed(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    monkeypatch.setattr(devices, "device_in_use", lambda: Device("gpu", "a GPU", capability))
    assert widest_head() == widest
    at_least, equal = (lambda c: capability >= parsed(c)), (lambda c: capability == parsed(c))
    monkeypatch.setattr(theirs, "check_compute_capability", at_least)
    monkeypatch.setattr(theirs, "is_cuda_compute_capability_equal", equal)
    layout = theirs.AttentionLayout.BTNH.value
    for width in range(8, widest + 1, 8):
        q = jax.ShapeDtypeStruct((1, 4, 2, width), jnp.bfloat16)
        for training in (True, False):
            theirs.check_is_flash_attention(q, q, q, layout, 90800, True, training)
