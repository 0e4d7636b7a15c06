"""What a path is said to be: every kind of directory that this project writes or reads."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from support.cases import DORA
from support.grids import always
from support.models import perturb, tiny_model
from support.needs import needs_smollm2
from support.runs import small_run

from zflora_jax import describe, fuse, init_adapters, preset, save_hf, save_peft, train
from zflora_jax.cli.main import main
from zflora_jax.config import METHODS, AdapterConfig, QuantizeConfig, RunConfig
from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.core.model import fingerprint
from zflora_jax.core.trees import size
from zflora_jax.hf.hub import locate


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, base_dir: str) -> Path:
    """A finished run of four steps."""
    path = tmp_path_factory.mktemp("info") / "run"
    train(override(small_run(base_dir), {"train.steps": 4}), path, console=False)
    return path


def test_a_run(workdir, base_dir, capsys):
    facts, report = describe(workdir), json.loads((workdir / "report.json").read_text())
    wanted = {
        "kind": "run",
        "base": base_dir,
        "method": "zflora-minimal",
        "rank": 4,
        "widths": "residual 64 -> 68, head 16 -> 16, MLP 96 -> 100",
        "trainable parameters": report["params_trainable"],
        "base parameters": report["params_base"],
        "steps": "4 of 4 saved",
        "base_fingerprint": report["base_fingerprint"],
        "seconds": report["seconds"],
        "eval loss": f"{report['test_loss']:.4f} at step 4",
    }
    assert wanted.items() <= facts.items() and facts["checkpoints"].endswith("4")
    assert all(isinstance(value, str | int | float) or value is None for value in facts.values())
    assert main(["info", str(workdir)]) == 0
    assert "zflora-minimal" in capsys.readouterr().out
    assert main(["info", str(workdir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts


def test_a_run_that_has_not_finished_or_lost_its_base(workdir, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    facts = describe(tmp_path)
    assert facts["steps"] == "0 of 4 saved" and "has not finished" in facts["report"]
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model": "/nowhere/at/all"}))
    facts = describe(tmp_path)
    assert "unknown" in facts["widths"] and facts["method"] == "zflora-minimal"


def test_settings_of_a_run_that_are_not_usual_are_shown(tmp_path):
    run = RunConfig(model="tiny", adapter=DORA, quantize=QuantizeConfig("nf4", 32))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(run)))
    facts = describe(tmp_path)
    assert (facts["use_dora"], facts["rank_pattern"]) == ("True", "{'q|down': 4}")
    assert "dropout" not in facts and "kernels nf4, group 32" in facts["base stored as"]


# Merged, widened without a residual state and with one.
@pytest.mark.parametrize("method", always(METHODS, {"lora", "ffba", "zflora-uniform"}.__contains__))
def test_an_export(method, tmp_path):
    model, adapter = tiny_model(), AdapterConfig(method, rank=4)
    fused = fuse(model, adapter, perturb(init_adapters(jax.random.key(0), model, adapter)))
    card = {"steps": 4, "test loss": 1.5}
    given = {"base_fingerprint": fingerprint(model), "card": card}
    written = save_hf(tmp_path / "out", fused, **given)
    wanted = {
        "kind": "export",
        "method": method,
        "dtype": "float32",
        "parameters": written["parameters"],
        "base_fingerprint": given["base_fingerprint"],
        "hidden_size": fused.config.hidden_size,
    }
    facts = describe(tmp_path / "out")
    assert (wanted | card).items() <= facts.items()
    units = (model.config.intermediate_size, fused.config.intermediate_size)
    assert "MLP {} -> {}".format(*units) in facts["widths"]
    assert METHODS[method].widens or "residual 64 -> 64" in facts["widths"]


def test_an_adapter_directory(tmp_path):
    model, adapter = tiny_model(), AdapterConfig("lora", rank=4, alpha=10, targets="q|v")
    adapters = init_adapters(jax.random.key(0), model, adapter)
    save_peft(tmp_path, model, adapter, adapters)
    wanted = {"kind": "adapter (PEFT)", "r": 4, "lora_alpha": 10, "parameters": size(adapters)}
    assert (wanted | {"target_modules": "q_proj, v_proj"}).items() <= describe(tmp_path).items()


def test_models(base_dir):
    facts = describe(base_dir)
    assert facts["kind"] in ("export", "model") and facts["num_layers"] == 1
    facts, wanted = describe("llama-3.2-1b"), preset("llama-3.2-1b").hidden_size
    assert (facts["kind"], facts["hidden_size"]) == ("model", wanted)
    assert facts["parameters"] == 1_235_814_400


@needs_smollm2
def test_a_gguf_file_tells_its_types(tmp_path):
    """Also that of a preset which a package brings."""
    path = locate("smollm2-135m")
    shutil.copy(path, tmp_path / "copy.gguf")
    for source in ("smollm2-135m", str(tmp_path / "copy.gguf")):
        facts = describe(source)
        assert facts["tensors"] == "210 Q4_1, 61 F32, 1 Q8_0"
        assert facts["kind"] == "model (GGUF)"


def test_what_cannot_be_described_is_said(workdir, tmp_path, refused):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"no run .* it holds notes\.txt"):
        describe(tmp_path)
    assert "nothing" in refused("info", workdir / "nothing")


def test_metrics_that_are_damaged_or_not_there_yet_are_said(workdir, tmp_path, refused):
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"st\n{"step": 1, "split": "train", "loss": 1.0}\n')
    assert "line 1: not a metrics record" in refused("info", tmp_path)
