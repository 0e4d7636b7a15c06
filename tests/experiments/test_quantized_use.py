"""Quantised bases where users meet them: the command line, settings of runs and sweeps, the plan,
damaged files.
"""

import gguf
import jax
import numpy as np
import pytest
from support.gguf_files import kept_file
from support.models import tiny_model
from support.quantized import quantized_tiny

from zflora_jax import Model, export_run, forward, load_model, preset, save_hf, train
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.cli.main import main
from zflora_jax.core import trees
from zflora_jax.core.errors import CheckpointError
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.run_config import QuantizeConfig, RunConfig
from zflora_jax.experiments.base import as_base
from zflora_jax.experiments.plan import stored_bytes
from zflora_jax.experiments.restore import load_fused
from zflora_jax.hf import load
from zflora_jax.hf.gguf.file import GGUFFile
from zflora_jax.hf.keys import quantized
from zflora_jax.hf.restore import read_manifest
from zflora_jax.nn.quantize_model import dequantize_model, is_quantized, quantize_model
from zflora_jax.ops.quantized import QuantizedArray
from zflora_jax.parallel import devices as on_devices


@pytest.mark.parametrize("part", [0, 2])  # the scale of a block, its minimum
def test_a_kept_scale_that_is_not_finite_is_named(part, tmp_path):
    path = tmp_path / "base.gguf"
    kept_file(path, "q4_1")
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data.reshape(-1)[20 * 3 + part :][:2] = np.asarray([np.nan], np.float16).view(np.uint8)
    tensor.data.flush()
    with pytest.raises(CheckpointError, match=r"base\.gguf: a scale of blk\.1\.ffn_up\.weight"):
        load_model(path, quantize="keep")
    assert GGUFFile(path).tensors  # the file itself can be read


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1"])
def test_scales_beyond_float16_are_refused_and_those_below_it_named(kind, tmp_path, caplog):
    model = tiny_model(head_dim=32, num_layers=1)
    up, beyond = model.params["layers"]["mlp"]["up"], rf"mlp/up/kernel .* of {kind}, whose scales"
    up["kernel"] *= 1e8
    save_hf(tmp_path / "large", model, dtype="float32")
    (tmp_path / "large" / "zflora.json").unlink()  # which reads its tensors one by one
    with pytest.raises(CheckpointError, match=beyond):
        quantize_model(model, kind)
    with pytest.raises(CheckpointError, match=beyond):
        load_model(tmp_path / "large", quantize=kind)
    up["kernel"] *= 1e-16
    save_hf(tmp_path / "small", model, dtype="float32")
    assert quantize_model(model, kind) and load_model(tmp_path / "small", quantize=kind)
    assert caplog.text.count(f"mlp/up/kernel as {kind} (1 such leaves): values below") == 2


def test_generate_runs_a_files_own_blocks_unless_it_is_told_not_to(tmp_path, capsys, monkeypatch):
    from support.byte_tokenizer import byte_tokenizer

    from zflora_jax.hf.gguf import read as reader

    monkeypatch.setattr(reader, "gguf_tokenizer", lambda *_: byte_tokenizer())
    path = tmp_path / "base.gguf"
    kept_file(path, "q4_1")
    given = ["generate", "--model", str(path), "--plain", "--prompt", "ab", "--max-new-tokens", "3"]
    assert main(given) == 0
    kept = capsys.readouterr()
    assert "q4_1: " in kept.err and "q8_0: embed" in kept.err and "--quantize none" in kept.err
    assert main([*given, "--quantize", "none"]) == 0
    numbers = capsys.readouterr()
    assert "q4_1" not in numbers.err and numbers.out == kept.out


def test_eval_scores_a_model_stored_as_codes(base_dir, tmp_path, monkeypatch):
    seen, plain = [], load.load_model

    def noted(*given, **settings):
        model = plain(*given, **settings)
        seen.append(is_quantized(model))  # eval frees it
        return model

    monkeypatch.setattr(load, "load_model", noted)
    argv = ["eval", "--model", base_dir, "--tasks", "arithmetic", "--limit", "2", "--out"]
    changed = ["--set", "quantize.kernels=int8", "eval.max_new_tokens=2"]
    assert main([*argv, str(tmp_path / "out"), *changed]) == 0
    assert seen == [True]


def test_a_base_in_memory_must_be_stored_as_the_run_says(run, base_dir):
    model = quantize_model(load_model(base_dir), "int8")
    with pytest.raises(ConfigError, match=r"the run says quantize.kernels=none: set quantize"):
        as_base(run, model)
    said = override(run, {"quantize.kernels": "int8"})
    assert as_base(said, model).params is model.params
    with pytest.raises(ConfigError, match=r"stored as floats, and the run says quantize.kernels="):
        as_base(said, load_model(base_dir))
    with pytest.raises(ConfigError, match=r"embedding of the model is stored as floats"):
        as_base(override(said, {"quantize.embedding": "int8"}), model)


@pytest.mark.soak  # a long run
def test_lora_beside_codes_is_merged_into_their_numbers_for_commands(run, tmp_path):
    config = override(run, {"adapter.method": "lora", "quantize.kernels": "int8"})
    workdir, out = tmp_path / "run", tmp_path / "out"
    trained = train(config, workdir, console=False)
    fused, _ = load_fused(workdir)
    assert not is_quantized(fused)
    tokens = np.arange(9, dtype=np.int32)[None]
    beside = np.asarray(forward(trained.model, tokens, config.adapter, trained.adapters))
    np.testing.assert_allclose(np.asarray(forward(fused, tokens)), beside, atol=1e-4)
    assert main(["export", "--workdir", str(workdir), "--out", str(out)]) == 0
    np.testing.assert_allclose(np.asarray(forward(load_model(out), tokens)), beside, atol=1e-4)
    with pytest.raises(ConfigError, match=r"'lora' changes them: .*convert_lora"):
        export_run(workdir, tmp_path / "x.gguf", format="gguf", quant="keep")


def test_the_plan_counts_each_devices_part_of_the_codes():
    config = preset("tiny").replace(num_heads=8, num_kv_heads=8, head_dim=32, vocab_size=264)
    run = RunConfig(quantize=QuantizeConfig("int8"))
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 4}
    whole, part = (stored_bytes(r, config)["base"] for r in (run, override(run, mesh)))
    assert whole / 8 <= part <= whole / 7  # scales of one group are whole along fsdp


def test_packing_takes_layers_out_of_a_model_that_is_given_away():
    stacked = quantized_tiny("q4_1")
    config = stacked.config.replace(scan_layers=False)
    apart = Model(config, trees.unstack_layers(stacked.params, config.num_layers))
    tokens = np.arange(9, dtype=np.int32)[None]
    wanted = np.asarray(forward(pack_for_decode(apart), tokens))
    assert "layers_0" in apart.params
    packed = pack_for_decode(apart, donate=True)
    assert not any(name.startswith("layers") for name in apart.params)
    np.testing.assert_array_equal(np.asarray(forward(packed, tokens)), wanted)


@pytest.mark.parametrize("left_out", [False, True], ids=["CPU", "JAX_PLATFORMS without it"])
def test_codes_of_a_base_are_made_on_the_cpu(left_out, monkeypatch):
    """Another device can round otherwise, and a run knows its base by its codes."""
    devices = jax.devices()  # as if the third were the host's CPU, and the fifth a GPU

    def local_devices(backend=None):
        assert backend == "cpu"
        if left_out:
            raise RuntimeError("Unknown backend cpu")
        return [devices[3]]

    monkeypatch.setattr(on_devices.jax, "local_devices", local_devices)
    x = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32)
    with jax.default_device(devices[5]):
        made = quantized(x, "int8", reads=1, writes=1, group=32)
    assert made.codes.devices() == {devices[5 if left_out else 3]}


def test_codes_of_a_model_in_memory_are_made_there_too(monkeypatch):
    """And are where its numbers were."""
    devices, asked = jax.devices(), []
    model = tiny_model()
    model.params = jax.device_put(model.params, devices[5])
    monkeypatch.setattr(
        on_devices.jax, "local_devices", lambda backend: (asked.append(backend), devices[3:])[1]
    )
    made = trees.flatten(quantize_model(model, "int8").params)
    codes = [leaf.codes for leaf in made.values() if isinstance(leaf, QuantizedArray)]
    assert asked == ["cpu"] * len(codes) and len(codes) == 7
    assert {device for leaf in codes for device in leaf.devices()} == {devices[5]}


def test_an_export_as_numbers_comes_back_as_numbers(tmp_path):
    """Its manifest has a fingerprint of the base's codes, none of floats."""
    base = quantized_tiny("q4_1", num_layers=1)
    save_hf(tmp_path / "x", base, dtype="bfloat16")
    written, codes = read_manifest(tmp_path / "x").base, trees.fingerprint(base.params)
    assert (written.codes_fingerprint, written.fingerprint) == (codes, None)
    back = trees.flatten(load_model(tmp_path / "x", "bfloat16").params)
    for name, leaf in trees.flatten(dequantize_model(base).params).items():
        np.testing.assert_array_equal(back[name], leaf.astype("bfloat16"), err_msg=name)
