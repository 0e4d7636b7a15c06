"""Slices of tasks in the shards of 1 to 4 ranks, and those that are refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from support.cases import case_id
from support.checks import assert_logits_close
from support.exports import WIDENED, tiny_family
from support.huggingface import TOKENS, hf_logits, open_stock
from support.models import tiny_model
from support.serving import LAYERS, local, save_tasks

import zflora_jax as zf
from zflora_vllm.slices import Part, SlicesError, _digest, parts, read_slices, require_same, writes
from zflora_vllm.worker import export_facts

pytestmark = pytest.mark.filterwarnings("ignore:head_dim")
SIZES = {"num_heads": 12, "num_kv_heads": 12, "hidden_size": 48, "head_dim": 8}

CELLS = [("llama", adapter) for adapter in WIDENED.values()]
CELLS += [("qwen3", WIDENED["zflora-uniform"])]


@pytest.mark.parametrize(("family", "adapter"), CELLS, ids=[f"{f}-{case_id(a)}" for f, a in CELLS])
def test_an_export_takes_the_slices_of_another_task(family, adapter, tmp_path):
    """All of them, and nothing else; and zeros make it the base."""
    base = tiny_family(family)
    eps_z = None if adapter.method == "ffba" else 2**-6
    save_tasks(tmp_path, adapter, base, eps_z, one=0.05, two=0.03)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    slices = read_slices((tmp_path / "two.safetensors").read_bytes(), "two")
    for task, found in ((slices, one), (slices.idle(), dict(one))):
        for name in task.rows:
            found[name] = found[name].clone()
            for write in writes(task, Part(name, *map(range, found[name].shape))):
                write.into(found[name])
        if task is slices:
            assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in two)
    save_file(found, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    assert_logits_close(hf_logits(open_stock(tmp_path / "one")), zf.forward(base, TOKENS), 2e-5)


@pytest.mark.parametrize("method", ["zflora-minimal", "zflora-uniform"])
@pytest.mark.parametrize(("kv_heads", "ranks"), [(12, 1), (12, 2), (12, 3), (12, 4), (2, 4)])
def test_every_rank_gets_its_shard_of_a_task(method, kv_heads, ranks, tmp_path):
    adapter = zf.AdapterConfig(
        method, rank=12, extra_mlp_units=4, extra_head_dim=4 if "uniform" in method else None
    )
    sizes = SIZES | {"num_kv_heads": kv_heads, "intermediate_size": 80}
    save_tasks(tmp_path, adapter, tiny_model(**sizes), one=0.05, two=0.03)
    config = json.loads((tmp_path / "one/config.json").read_text())
    of = {"hidden": config["hidden_size"], "mlp": config["intermediate_size"], "heads": 12}
    of |= {"kv_heads": kv_heads, "head_dim": config["head_dim"]}
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    slices = read_slices((tmp_path / "two.safetensors").read_bytes(), "two")
    copies = max(1, ranks // kv_heads)
    for rank in range(ranks):
        for layer in [f"model.layers.{i}.{name}" for i in range(2) for name in LAYERS]:
            weight, wanted = (local(x, layer, ranks, rank, copies).clone() for x in (one, two))
            before = weight.clone()
            made = [w for part in parts(layer, of, rank, ranks) for w in writes(slices, part)]
            back = [write.kept(weight) for write in made]
            for write in made:
                write.into(weight)
            assert torch.equal(weight, wanted) and not torch.equal(weight, before)
            for write in back:
                write.into(weight)
            assert torch.equal(weight, before)


def test_what_does_not_belong_together_is_refused(tmp_path):
    adapter = WIDENED["zflora-minimal"]
    tasks = {"one": 0.05, "two": 0.03}
    fused = save_tasks(tmp_path, adapter, tiny_model(**SIZES), dtype="bfloat16", **tasks)
    assert zf.save_slices(tmp_path / "three.safetensors", fused, eps_z=1.0)["own_eps_z"] < 1.0
    data = (tmp_path / "two.safetensors").read_bytes()
    slices, facts = read_slices(data, "two"), export_facts(tmp_path / "one")
    require_same(slices.facts, facts, "two", "one")
    for key, other in (("eps_z", 0.5), ("base", "x"), ("dtype", "float32"), ("method", "ffba")):
        with pytest.raises(SlicesError, match=f"two has {key} .*, and one has {other}"):
            require_same(slices.facts, facts | {key: other}, "two", "one")
    assert all((x == 0).all() for _, x in slices.idle().rows.values())
    damaged = bytearray(data)
    damaged[-1] ^= 1
    for wrong, words in (
        (bytes(damaged), "is damaged: its content does not have the recorded hash"),
        (data[:-9], "holds no slices, or is damaged"),
        ((tmp_path / "one/model.safetensors").read_bytes(), "holds no slices"),
    ):
        with pytest.raises(SlicesError, match=words):
            read_slices(wrong, "x")
    name, signed = "model.layers.0.mlp.up_proj.weight", load(data)
    for part, cut, words in (
        ("rows", np.s_[:, :-1], f"{name}: the slices are of lines of other lengths"),
        ("rows", np.s_[:-1], "x contradicts itself"),
        ("columns", np.s_[:, :-1], "x contradicts itself"),
    ):
        wrong = signed | {f"{name}.{part}": signed[f"{name}.{part}"][cut].contiguous()}
        said = {key: value for key, value in slices.facts.items() if key != "sha256"}
        said |= {"sha256": _digest(wrong, said)}
        with pytest.raises(SlicesError, match=words):
            found = read_slices(save(wrong, {"zflora": json.dumps(said)}), "x")
            writes(found, Part(name, range(84), range(60)))
    with pytest.raises(SlicesError, match="is no fused export of zflora_jax"):
        export_facts(tmp_path)
    with pytest.raises(SlicesError, match="86 lines are not divided by 4 ranks"):
        parts("model.layers.0.mlp.down_proj", {"hidden": 60, "mlp": 86, "head_dim": 8}, 0, 4)
    lora = zf.AdapterConfig("lora", rank=2)
    base = tiny_model()
    merged = zf.fuse(base, lora, zf.init_adapters(np.uint32([0, 1]), base, lora))
    codes = zf.quantize_model(base, zf.QuantizeConfig("int8"))
    minimal = zf.init_adapters(np.uint32([0, 1]), base, adapter)
    for name, model, words in (
        ("x", fused, "ends in .safetensors"),
        ("x.safetensors", merged, "this model has lora: fuse one"),
        ("x.safetensors", base, "and this model has None"),
        ("x.safetensors", zf.fuse(codes, adapter, minimal), "quantised base are not written"),
    ):
        with pytest.raises(zf.ConfigError, match=words):
            zf.save_slices(tmp_path / name, model)
    assert not (tmp_path / "x.safetensors").exists()
