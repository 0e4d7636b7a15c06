"""Exporting a run: what can fail does so before anything is written, and data that is gone is
nothing that has to fail.
"""

import json
import re
from pathlib import Path

import pytest
from support.chat import SHORT, turn
from support.exports import WIDENED, fused_model
from support.runs import small_run
from support.tasks import write

from zflora_jax import ConfigError, load_model, override, save_hf, train
from zflora_jax.cli.main import main
from zflora_jax.core import trees
from zflora_jax.evaluation import export_gap as gap_module
from zflora_jax.experiments import restore
from zflora_jax.experiments.export import EXPORTERS, Exporter, export_run
from zflora_jax.hf.restore import load_stock, read_manifest
from zflora_jax.training.workdir import saved_steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base_dir):
    """(workdir, data directory) of a run on JSON files."""
    folder = tmp_path_factory.mktemp("own")
    rows = [{"instruction": f"Say {i}.", "output": f"{i}", "answer": f"{i}"} for i in range(40)]
    for split in ("train", "validation", "test"):
        write(folder / "data" / f"{split}.jsonl", *rows)
    own = {"data.task": "rows", "data.data_dir": str(folder / "data")}
    run = override(small_run(base_dir), own | {"train.steps": 3, "eval.limit": 4})
    train(run, folder / "run", console=False)
    return folder / "run", folder / "data"


def test_a_run_is_exported_with_its_data_and_without(trained, tmp_path, caplog):
    workdir, data = trained
    report = export_run(workdir, tmp_path / "with")
    assert report["gap_prompts"] == "8 held-out rows" and report["top1_agreement"] == 1.0
    assert "cannot be read" not in caplog.text
    data.rename(data.with_name("moved"))
    try:
        report = export_run(workdir, tmp_path / "without")
    finally:
        data.with_name("moved").rename(data)
    assert report["gap_prompts"] == "3 built-in texts"
    assert report["max_abs_dlogit"] <= 1e-5 * report["logit_scale"]
    text = "the export is compared on built-in texts, because the run's held-out rows give no"
    assert text in caplog.text
    one, two = ({p.name for p in (tmp_path / name).iterdir()} for name in ("with", "without"))
    assert one == two
    manifest = json.loads((tmp_path / "with" / "zflora.json").read_text())
    loss = json.loads((workdir / "report.json").read_text())["test_loss"]
    figures = {"task": "rows", "steps": 3, "test loss": loss}
    assert figures.items() <= manifest["figures"].items()


@pytest.mark.parametrize("quant", ["int8", "w8a8"])
def test_a_run_is_exported_with_quantised_kernels(trained, tmp_path, quant):
    report = export_run(trained[0], tmp_path / "x", quant=quant)
    assert (
        "filled with zeros" in report
        and report["top1_agreement"] > 0.9
        and report["quant"].startswith(quant)
    )
    assert report["max_abs_dlogit"] < 0.05 * report["logit_scale"]
    assert read_manifest(tmp_path / "x").quant == quant


def test_the_base_of_a_run_is_not_written_over(trained, tmp_path, monkeypatch, base_dir):
    """`save_hf` made it, so it looks like an export; without it the run is lost."""
    monkeypatch.chdir(tmp_path)
    before = (Path(base_dir) / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(base_dir)
    for out in (base_dir, f"{base_dir}/.", "link"):
        with pytest.raises(ConfigError, match="is the model that this run was trained on"):
            export_run(trained[0], out)
    assert (Path(base_dir) / "model.safetensors").read_bytes() == before


def test_processes_load_the_checkpoint_that_process_0_chose(trained, monkeypatch):
    assert saved_steps(trained[0]) == [2, 3]
    chosen = []
    monkeypatch.setattr(restore, "from_process_0", lambda own: (chosen.append(own), 2)[1])
    assert restore.load_run(trained[0])[3] == 2 and chosen == [3]


def test_what_fails_leaves_no_directory(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(gap_module, "load_mixture", lambda *_: 1 / 0)  # as a fault of ours would
    with pytest.raises(ZeroDivisionError):
        export_run(trained[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_format_is_a_row_of_the_table(trained, tmp_path, monkeypatch, capsys):
    """The command line offers it, and the function is called with the settings that it names."""
    workdir, _ = trained

    def write(out, run, **settings):
        return {"steps written": run.step} | settings

    row = Exporter("the steps alone", write, ("dtype",), lambda out, **settings: None)
    monkeypatch.setitem(EXPORTERS, "steps", row)
    command = ["export", "--workdir", str(workdir), "--out", str(tmp_path / "o")]
    assert main([*command, "--format", "steps", "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert re.search("steps written.*3", out) and "float16" in out and "eps_z" not in out
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "steps: the steps alone" in " ".join(capsys.readouterr().out.split())


def test_a_gguf_file_of_a_run(trained, tmp_path):
    report = export_run(trained[0], tmp_path / "x.gguf", format="gguf", quant="f32")
    assert report["max_abs_dlogit"] <= 1e-5 * report["logit_scale"]
    assert {"filled with zeros", "fallback"} <= report.keys()
    assert export_run(trained[0], tmp_path / "x.gguf", format="gguf")["quant"] == "q8_0"


@pytest.mark.parametrize(
    ("format", "out", "settings", "words"),
    [
        ("hf", "x.gguf", {}, "add --format gguf "),
        ("peft", "x.gguf", {}, "add --format gguf "),
        ("hf", "x", {"quant": "q8_0"}, "go with --format gguf"),
        ("gguf", "x.gguf", {"quant": "q5"}, "quant='q5'"),
        ("gguf", "x", {}, r"ends in \.gguf"),
        ("gguf", "x.gguf", {"dtype": "float32"}, "--dtype goes with --format hf"),
        ("peft", "x", {"eps_z": 0.5}, "--eps goes with --format hf or gguf"),
        ("onnx", "x", {}, "format='onnx'"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_run_is_loaded(
    format, out, settings, words, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr("zflora_jax.experiments.restore.load_run", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=words):
        export_run(trained[0], tmp_path / out, format=format, **settings)


def test_prompts_of_an_export_fit_the_context(base_dir, tmp_path):
    """Of conversations, too, which are never cut; training leaves the long ones out."""
    write(tmp_path / "train.jsonl", *({"messages": SHORT} for _ in range(4)))
    write(tmp_path / "test.jsonl", {"messages": [turn("user", "a" * 900), SHORT[1]]})
    changes = {"data.task": "rows", "data.data_dir": str(tmp_path)}
    model = load_model(base_dir)
    for longest, wanted in ((320, 320), (1024, model.config.max_position_embeddings)):
        run = override(small_run(base_dir), changes | {"data.bucket_lengths": [longest]})
        (prompt,), kind = gap_module.gap_prompts(run, model)
        assert len(prompt) == wanted and kind == "1 held-out rows"


@pytest.mark.filterwarnings("ignore:head_dim")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_is_checked_in_the_dtype_it_has(dtype, bases, tmp_path):
    """Four bytes a number would not fit where two do. Heads whose scale is undone are float32."""
    turned = {"layers/attn/q/kernel", "layers/attn/k/kernel"}
    for method, wide in (("zflora-uniform", turned), ("zflora-minimal", set())):
        save_hf(tmp_path / method, fused_model(bases["plain"], WIDENED[method]), dtype=dtype)
        params = trees.flatten(load_stock(tmp_path / method).params)
        other = {name for name, leaf in params.items() if str(leaf.dtype) != dtype}
        assert other == (set() if dtype == "float32" else wide)
