"""What was trained on a mesh is used on it, equal to one device: loaded, evaluated, generated from,
fused, exported, no device holding the whole.
"""

import dataclasses
import json
import logging
import re
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_logits_close, assert_trees_equal
from support.grids import always
from support.models import perturb, tiny_model

from zflora_jax.adapters.fuse import _fuse, _unfuse, fuse, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.swapping import _swap, swap
from zflora_jax.bench.latency import decode_latency
from zflora_jax.cli.main import main
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.architecture import param_shapes
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from zflora_jax.evaluation.loss import held_out_loss
from zflora_jax.experiments.export import export_run
from zflora_jax.experiments.restore import load_fused, load_run
from zflora_jax.experiments.setup import held_out
from zflora_jax.experiments.train import train
from zflora_jax.hf.load import load_model
from zflora_jax.hf.save import save_hf
from zflora_jax.inference.beam import BeamProgram
from zflora_jax.inference.decode import generate_tokens, stream_tokens
from zflora_jax.inference.likelihood import option_log_likelihoods
from zflora_jax.inference.model_call import packed
from zflora_jax.inference.program import DecodeProgram
from zflora_jax.inference.sampling import GREEDY, Sampler
from zflora_jax.inference.serving import serve
from zflora_jax.nn.llama import forward
from zflora_jax.parallel import sharding
from zflora_jax.parallel.mesh import mesh_in_use, mesh_of
from zflora_jax.parallel.sharding import make_mesh, shard
from zflora_jax.training.trainer import init_state, make_train_step

MESH = MeshConfig(fsdp=2, tensor=2)
PROMPTS = [[5, 9, 77, 30, 2, 61], [8, 200, 31], [100, 101, 102, 103, 7]]


def model_for_meshes(**changes):
    """A tiny model whose every width 4 divides, of answers that vary."""
    changes = {"num_layers": 2} | changes
    model = tiny_model(
        num_heads=4,
        num_kv_heads=4,
        vocab_size=264,
        tie_word_embeddings=False,
        max_position_embeddings=768,
        **changes,
    )
    model.tokenizer = byte_tokenizer()
    return model


def adapter_of(method):
    """Widths that 2 and 4 divide beside the base's."""
    return AdapterConfig(method, rank=8, alpha=12.0)


def both(method, mesh_config=MESH, **changes):
    """(adapter, base, adapters) on one device, and the same two on a mesh."""
    model, adapter = model_for_meshes(**changes), adapter_of(method)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter), std=0.05)
    mesh = make_mesh(mesh_config)
    divided = dataclasses.replace(model, params=shard(model.params, mesh))
    return adapter, (model, adapters), (divided, shard(adapters, mesh))


def assert_divided(params, parts=4):
    """Every device holds one of `parts` parts of every kernel and table."""
    for name, leaf in trees.flatten(params).items():
        if not name.endswith("scale"):
            sizes = {shard.data.size for shard in leaf.addressable_shards}
            assert sizes == {leaf.size // parts}, (name, leaf.shape, leaf.sharding)


def assert_same(got, want, *, exact=True):
    """Equal bit by bit, or, where numbers are added in another order, within 1e-5 of each leaf's
    largest.
    """
    if exact:
        return assert_trees_equal(got, want)
    for name, leaf in trees.flatten(want).items():
        np.testing.assert_allclose(
            trees.flatten(got)[name], leaf, atol=1e-5 * float(np.abs(leaf).max()), err_msg=name
        )


def assert_no_whole_kernel(text, config):
    """No array that a compiled program stores (so not those inside a fusion) is as large as the
    smallest whole kernel, but for a device's part of a table.
    """
    text = "\n\n".join(
        part
        for part in text.split("\n\n")
        if not part.lstrip().startswith(("%fused_", "%wrapped_"))
    )
    kernels = [
        int(np.prod(shape))
        for name, shape in param_shapes(config).items()
        if "layers" in name and "kernel" in name
    ]
    for dims in re.findall(r"\w+\[([\d,]+)\]", text):
        shape = [int(n) for n in dims.split(",")]
        assert np.prod(shape) < min(kernels) or shape == [
            config.vocab_size // 2,
            config.hidden_size // 2,
        ], dims


@pytest.mark.parametrize("method", always(METHODS, lambda m: m not in ("ffa", "ffba")))
def test_a_model_on_a_mesh_computes_what_one_device_does(method):
    adapter, (model, adapters), (divided, beside) = both(method)
    tokens = np.asarray([PROMPTS[0]])
    assert_logits_close(
        forward(divided, tokens, adapter, beside), forward(model, tokens, adapter, adapters)
    )
    whole, fused = fuse(model, adapter, adapters), fuse(divided, adapter, beside)
    assert_divided(fused.params)
    assert_same(fused.params, whole.params, exact=METHODS[method].in_place != "lora")
    assert generate_tokens(fused, PROMPTS, max_new_tokens=8) == generate_tokens(
        whole, PROMPTS, max_new_tokens=8
    )
    assert_divided(packed(fused).params)
    assert packed(fused) is packed(fused)
    if METHODS[method].in_place == "none":
        base, _ = unfuse(fused)
        assert_divided(base.params)
        assert_trees_equal(base.params, model.params)
        other = perturb(adapters, seed=3)
        wanted = fuse(model, adapter, other).params
        swapped = swap(fused, other)
        assert_divided(swapped.params)
        assert_trees_equal(swapped.params, wanted)


@pytest.mark.parametrize(
    "mesh_config",
    always(
        [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4)], lambda mesh: mesh.tensor == 2
    ),
    ids=str,
)
def test_every_way_to_run_a_model_follows_its_mesh(mesh_config):
    """Loss, likelihoods, sampling, beams, a stream, adapters beside the base and of each row,
    requests of several tasks.
    """
    adapter, (model, adapters), (divided, beside) = both(
        "zflora-minimal", mesh_config, num_layers=1
    )
    whole, fused = fuse(model, adapter, adapters), fuse(divided, adapter, beside)
    options = [[[4, 9], [7], [4, 8, 200]], [[11, 12], [13, 14]], [[1], [2]]]
    for have, want in zip(
        option_log_likelihoods(fused, PROMPTS, options),
        option_log_likelihoods(whole, PROMPTS, options),
        strict=True,
    ):
        np.testing.assert_allclose(have, want, rtol=2e-5)
    settings = {"max_new_tokens": 6, "stop_token_ids": [263]}
    drawn = settings | {"sampler": Sampler(0.8, top_p=0.9), "batch_size": 2}
    assert generate_tokens(fused, PROMPTS, **drawn) == generate_tokens(whole, PROMPTS, **drawn)
    assert generate_tokens(fused, PROMPTS, num_beams=2, **settings) == generate_tokens(
        whole, PROMPTS, num_beams=2, **settings
    )
    assert (
        list(stream_tokens(fused, PROMPTS[0], **settings))
        == generate_tokens(whole, PROMPTS[:1], **settings)[0]
    )
    wanted = generate_tokens(model, PROMPTS, adapter=adapter, adapters=adapters, **settings)
    assert generate_tokens(divided, PROMPTS, adapter=adapter, adapters=beside, **settings) == wanted
    tasks = {"a": adapters, "b": perturb(adapters, seed=5)}
    requests = [("a", PROMPTS[0]), ("b", PROMPTS[1]), ("a", PROMPTS[2])]
    apart = dataclasses.replace(fused, params=packed(fused).params, config=packed(fused).config)
    assert dict(serve(fused, tasks, requests, **settings)) == dict(
        serve(whole, tasks, requests, **settings)
    )
    assert generate_tokens(apart, PROMPTS, **drawn) == generate_tokens(whole, PROMPTS, **drawn)


def test_adapters_that_lie_on_one_device_go_with_a_model_on_a_mesh():
    """As those of a run that was trained on one device do, with a base that was loaded on
    a mesh.
    """
    adapter, (model, adapters), (divided, _) = both("zflora-minimal")
    here = jax.device_put(adapters, jax.devices()[0])
    fused = fuse(divided, adapter, here)
    assert_trees_equal(fused.params, fuse(model, adapter, adapters).params)
    assert_divided(swap(fused, here).params)
    tokens = np.asarray([PROMPTS[0]], np.int32)
    want = forward(model, tokens, adapter, adapters)
    assert_logits_close(forward(divided, tokens, adapter, here), want)
    settings = {"max_new_tokens": 5, "adapter": adapter}
    want = generate_tokens(model, PROMPTS, adapters=adapters, **settings)
    assert generate_tokens(divided, PROMPTS, adapters=here, **settings) == want


def test_latency_is_measured_on_the_mesh_of_a_model():
    _, _, (divided, _) = both("lora", num_layers=1)
    assert decode_latency({"base": divided}, new_tokens=2, repeats=1)["base"]["tpot_ms"] > 0


def test_no_program_holds_a_whole_kernel():
    """Neither fusing nor taking apart nor swapping nor decoding: each device's own part of a kernel
    is the largest of it that any of them makes.
    """
    adapter, _, (model, adapters) = both("zflora-uniform", num_layers=1, hidden_size=80)
    fused = fuse(model, adapter, adapters)
    run = packed(fused)
    tokens, valid = np.ones((1, 16), np.int32), np.ones((1, 16), bool)
    given = {"params": run.params}, tokens, valid
    keys = jax.random.split(jax.random.key(0), 1)
    with jax.set_mesh(make_mesh(MESH)):
        programs = {
            "fuse": _fuse.lower(model.config, adapter, model.params, adapters),
            "unfuse": _unfuse.lower(model.config, adapter, fused.params),
            "swap": _swap.lower(fused.config, model.config, adapter, fused.params, adapters),
            "decode": DecodeProgram.decode.lower(
                DecodeProgram(run.config, None, GREEDY, (1,)), *given, keys, 8
            ),
            "beams": BeamProgram.search.lower(BeamProgram(run.config, None, 2, (1,)), *given, 8),
        }
    for name, program in programs.items():
        text = program.compile().as_text()
        assert "all-gather" not in text or name in (
            "unfuse",
            "beams",
        ), name  # these gather blocks, and scores
        assert_no_whole_kernel(text, fused.config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run on fsdp=2 x tensor=2."""
    folder = tmp_path_factory.mktemp("mesh")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZFLORA_CACHE", str(folder / "cache"))
        save_hf(folder / "model", model_for_meshes())
        run = RunConfig(
            model=str(folder / "model"),
            adapter=adapter_of("zflora-uniform"),
            data=DataConfig(batch_size=4, bucket_lengths=(320,), train_limit=16),
            optim=OptimConfig(warmup_steps=1, learning_rate=3e-2, schedule="constant"),
            train=TrainConfig(steps=3, loss_chunk=128),
            eval=EvalConfig(limit=3, batch_size=2, max_new_tokens=6),
            mesh=MESH,
        )
        train(run, folder / "run", console=False)
        yield folder / "run"


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_a_run_is_loaded_and_used_on_its_mesh(trained, tmp_path):
    run, base, adapters, step = load_run(trained)
    _, alone, wanted, _ = load_run(trained, mesh=one_device())
    assert step == 3 and float(np.abs(wanted["layers"]["attn"]["q"]["backward"]).max()) > 1e-3
    assert_divided(base.params)
    assert adapters["layers"]["attn"]["q"]["forward"].sharding.mesh.shape == {
        "data": 1,
        "fsdp": 2,
        "tensor": 2,
    }
    assert_trees_equal(adapters, wanted)
    _, rows = held_out(run, alone)
    losses = [
        held_out_loss(m, rows, run.data, adapter=run.adapter, adapters=a, batch_size=3)["loss"]
        for m, a in ((base, adapters), (alone, wanted))
    ]
    report = json.loads((trained / "report.json").read_text())
    np.testing.assert_allclose(
        losses, report["test_loss" if run.eval.split == "test" else "validation_loss"], rtol=2e-5
    )
    fused, label = load_fused(trained)
    assert label == "step3"
    assert_divided(fused.params)
    assert_trees_equal(fused.params, load_fused(trained, mesh=one_device())[0].params)


def test_commands_use_the_mesh_of_the_run_or_the_one_given(trained, tmp_path, capsys, monkeypatch):
    """eval, generate and export: the same answers, losses and files from four devices (the run's)
    and from the mesh that --set names.
    """
    used = []
    real = mesh_of
    for module in ("inference.decode", "evaluation.loss", "adapters.fuse"):
        monkeypatch.setattr(
            f"zflora_jax.{module}.mesh_in_use",
            lambda tree: used.append(real(tree)) or mesh_in_use(tree),
        )
    found = {}
    for name, settings, parts in (
        ("run", [], 4),
        ("one", ["--set", "mesh.fsdp=1", "mesh.tensor=1"], 1),
    ):
        used.clear()
        assert (
            main(
                [
                    "eval",
                    "--workdir",
                    str(trained),
                    "--out",
                    str(tmp_path / name / "eval"),
                    *settings,
                ]
            )
            == 0
        )
        assert (
            main(
                [
                    "generate",
                    "--workdir",
                    str(trained),
                    "--prompt",
                    "2+3=",
                    "--max-new-tokens",
                    "5",
                    *settings,
                ]
            )
            == 0
        )
        assert {1 if mesh is None else mesh.size for mesh in used} == {parts}
        printed = capsys.readouterr().out.splitlines()[-1]
        assert (
            main(
                [
                    "export",
                    "--workdir",
                    str(trained),
                    "--out",
                    str(tmp_path / name / "out"),
                    *settings,
                ]
            )
            == 0
        )
        assert "top1_agreement" in capsys.readouterr().out
        [summary] = (tmp_path / name / "eval").glob("summary-*.json")
        [rows] = (tmp_path / name / "eval").glob("arithmetic*.jsonl")
        answers = [json.loads(line)["output"] for line in rows.read_text().splitlines()]
        found[name] = json.loads(summary.read_text())["tasks"][0]["loss"], answers, printed
    np.testing.assert_allclose(found["run"][0], found["one"][0], rtol=2e-5)
    assert found["run"][1:] == found["one"][1:]
    for file in ("model.safetensors", "zflora/restore.safetensors"):
        assert (tmp_path / "run" / "out" / file).read_bytes() == (
            tmp_path / "one" / "out" / file
        ).read_bytes()
    there, here = (
        json.loads((tmp_path / name / "out" / "zflora.json").read_text()) for name in found
    )
    assert there["base"]["fingerprint"] == here["base"]["fingerprint"]
    # The export is itself used on a mesh.
    divided = load_model(str(tmp_path / "run" / "out"), mesh=make_mesh(MESH))
    assert_divided(divided.params)
    argv = [
        "generate",
        "--model",
        str(tmp_path / "run" / "out"),
        "--prompt",
        "2+3=",
        "--max-new-tokens",
        "5",
    ]
    assert main(argv) == 0 and main([*argv, "--set", "mesh.fsdp=2", "mesh.tensor=2"]) == 0
    [once, again] = capsys.readouterr().out.splitlines()
    assert once == again


def test_an_export_does_not_gather_the_model(trained, tmp_path):
    """One tensor of one layer is on the host at a time: no array of the model keeps a copy
    there.
    """
    model, _ = load_fused(trained)
    save_hf(tmp_path / "out", model)
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(model.params))


def test_with_fewer_devices_a_run_is_loaded_onto_one(trained, tmp_path, caplog):
    shutil.copytree(trained, tmp_path / "run")
    config = json.loads((trained / "config.json").read_text()) | {
        "mesh": {"data": 1, "fsdp": 2, "tensor": 32}
    }
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "zflora_jax"):
        _, model, adapters, _ = load_run(tmp_path / "run")
    assert (
        "a run of 64 devices (mesh.data=1 x mesh.fsdp=2 x mesh.tensor=32) is loaded onto one: here"
        " are only 8" in caplog.text
    )
    assert all(
        len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves((model.params, adapters))
    )


@pytest.mark.parametrize("command", ["generate", "export"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "train.steps=3",
            "--set train.steps: what has been trained cannot be changed here; mesh.* can",
        ),
        ("mesh.fdsp=2", "unknown key 'fdsp' of MeshConfig: did you mean 'fsdp'?"),
        ("mesh.data=8", "mesh.data=8 x mesh.fsdp=2 x mesh.tensor=2 needs 32 devices; there are 8"),
    ],
)
def test_other_settings_and_too_few_devices_are_refused(
    command, setting, message, trained, tmp_path, capsys
):
    more = ["--prompt", "x"] if command == "generate" else ["--out", str(tmp_path / "out")]
    assert main([command, "--workdir", str(trained), *more, "--set", setting]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_several_processes_is_refused(monkeypatch):
    """Before anything is computed: no process sees the whole."""
    _, _, (divided, _) = both("lora")
    monkeypatch.setattr(
        type(jax.tree.leaves(divided.params)[0]), "is_fully_addressable", property(lambda _: False)
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for use in (
        lambda: generate_tokens(divided, PROMPTS, max_new_tokens=2),
        lambda: next(stream_tokens(divided, PROMPTS[0], max_new_tokens=2)),
        lambda: option_log_likelihoods(divided, [[1]], [[[2]]]),
        lambda: save_hf("never", divided),
    ):
        with pytest.raises(
            ConfigError,
            match=r"divided over 2 processes, which cannot .* together. Start one process",
        ):
            use()
    with pytest.raises(ConfigError, match="2 processes cannot export a run together"):
        export_run("nowhere", "never")


# --- widths that a mesh does not divide -----------------------------------------------------------


def test_a_vocabulary_that_tensor_does_not_divide_is_whole_along_it(caplog):
    """Tokens 33 and 259 are real sizes' odd ends: 32001 with one token added. Everything else that
    an axis does not divide stays refused.
    """
    sharding._warn.cache_clear()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    with caplog.at_level(logging.WARNING, "zflora_jax"):
        assert sharding.spec("embed/embedding", (259, 64), mesh) == P(None, "fsdp")
        assert sharding.spec("lm_head/kernel", (64, 259), mesh) == P("fsdp", None)
        sharding.spec("lm_head/kernel", (64, 259), mesh)
    assert (
        caplog.text.count(
            "mesh.tensor=2 does not divide the vocabulary of 259: every device along tensor holds"
            " all rows of lm_head/kernel"
        )
        == 1
    )
    with pytest.raises(ConfigError, match=r"mesh.fsdp=2 does not divide embed/embedding"):
        sharding.spec("embed/embedding", (259, 63), mesh)
    with pytest.raises(ConfigError, match=r"mesh.tensor=2 does not divide layers_0/mlp/up/kernel"):
        sharding.spec("layers_0/mlp/up/kernel", (64, 33), mesh)


def test_an_undivided_vocabulary_trains_scores_and_decodes_as_on_one_device():
    model = tiny_model(num_heads=4, num_kv_heads=4, vocab_size=259, num_layers=1)
    adapter = adapter_of("zflora-minimal")
    # Steps donate the state.
    adapters = jax.device_get(perturb(init_adapters(jax.random.key(0), model, adapter), std=0.05))
    tokens = np.random.default_rng(0).integers(0, 259, (4, 24)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "loss_mask": np.ones((4, 24), bool),
        "segments": np.ones((4, 24), np.int32),
    }
    found = []
    for mesh_config in (MeshConfig(), MeshConfig(fsdp=2, tensor=2)):
        mesh = make_mesh(mesh_config, jax.devices()[: mesh_config.fsdp * mesh_config.tensor])
        state = init_state(adapters, OptimConfig(warmup_steps=0, eps=1e-3), 4)
        where = sharding.state_shardings(state, mesh)
        step = make_train_step(
            model.config, adapter, OptimConfig(warmup_steps=0, eps=1e-3), 4, 1, 32, where
        )
        divided = dataclasses.replace(model, params=shard(model.params, mesh))
        with jax.set_mesh(mesh):
            rows = jax.device_put(batch, sharding.batch_sharding(mesh))
            state, metrics = step(divided.params, jax.device_put(state, where), rows)
            state, metrics = step(divided.params, state, rows)
        fused = fuse(divided, adapter, shard(adapters, mesh))
        scores = option_log_likelihoods(fused, PROMPTS[:1], [[[4, 9], [7]]])[0]
        found.append(
            (
                float(metrics["loss"]),
                float(metrics["grad_norm"]),
                scores,
                generate_tokens(fused, PROMPTS, max_new_tokens=6),
            )
        )
    (loss, norm, scores, tokens), (wanted_loss, wanted_norm, wanted, answers) = found
    np.testing.assert_allclose(
        [loss, norm, *scores], [wanted_loss, wanted_norm, *wanted], rtol=2e-5
    )
    assert tokens == answers


def test_an_axis_that_does_not_divide_a_fused_width_goes_to_another(caplog):
    sharding._warn.cache_clear()
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))

    def fused(name, *shape):
        return sharding.spec(name, shape, mesh, fused=True)

    # Whole heads.
    assert fused("layers/attn/q/kernel", 3, 67, 4, 32) == P(None, None, ("tensor", "fsdp"), None)
    assert fused("layers/attn/q/kernel", 3, 67, 2, 32) == P(None, None, "tensor", "fsdp")
    assert fused("layers/attn/o/kernel", 3, 4, 32, 67) == P(None, ("tensor", "fsdp"), None, None)
    assert fused("layers/mlp/gate/kernel", 3, 67, 132) == P(None, None, ("tensor", "fsdp"))
    assert fused("layers/mlp/gate/kernel", 3, 64, 131) == P(None, ("fsdp", "tensor"), None)
    assert fused("embed/embedding", 264, 67) == P(("tensor", "fsdp"), None)
    with caplog.at_level(logging.WARNING, "zflora_jax"):
        assert fused("layers/mlp/up/kernel", 3, 67, 130) == P(None, None, "tensor")
    assert "mesh.fsdp=2 divides no dimension of mlp/up/kernel, shape (67, 130)" in caplog.text
    assert (
        "widens the stream of 67 by 1 more (rank, extra_head_dim or extra_mlp_units)" in caplog.text
    )
    with pytest.raises(ConfigError, match="does not divide"):
        sharding.spec("layers/attn/q/kernel", (3, 67, 4, 32), mesh)


def test_a_fused_model_of_an_odd_rank_is_divided_all_the_same():
    model, adapter = (
        model_for_meshes(num_layers=1),
        AdapterConfig("zflora-minimal", rank=3, extra_mlp_units=4),
    )
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter), std=0.05)
    mesh = make_mesh(MESH)
    divided = dataclasses.replace(model, params=shard(model.params, mesh))
    whole, fused = fuse(model, adapter, adapters), fuse(divided, adapter, adapters)
    assert fused.config.hidden_size == 67
    assert_divided(fused.params)
    assert_trees_equal(fused.params, whole.params)
    assert generate_tokens(fused, PROMPTS, max_new_tokens=6) == generate_tokens(
        whole, PROMPTS, max_new_tokens=6
    )
    assert_trees_equal(unfuse(fused)[0].params, model.params)


def test_devices_that_stay_idle_are_named_with_the_setting_that_uses_them(caplog):
    sharding._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "zflora_jax"):
        make_mesh(MeshConfig(), jax.devices()[:1])  # as a sweep gives each run its part
        make_mesh(MeshConfig(data=8))
        assert not caplog.text
        make_mesh(MeshConfig())
        make_mesh(MeshConfig())
    assert (
        caplog.text.count(
            "the mesh uses 1 of 8 devices, 7 stay idle: set mesh.data=8 or mesh.fsdp=8 to use them"
        )
        == 1
    )
    with caplog.at_level(logging.WARNING, "zflora_jax"):
        make_mesh(MeshConfig(data=3))
    assert (
        "3 of 8 devices, 5 stay idle: set mesh.data=6 or mesh.fsdp=2 to use most of them"
        in caplog.text
    )
