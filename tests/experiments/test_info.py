"""What a path is said to be: every kind of directory that this project writes or reads."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from support.cases import DORA
from support.grids import always
from support.models import needs_smollm2, perturb, tiny_model
from support.runs import small_run

from zflora_jax.adapters.fuse import fuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.cli import generate
from zflora_jax.cli.main import _parser, main
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import METHODS, AdapterConfig
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.presets import preset
from zflora_jax.core.trees import size
from zflora_jax.experiments import info as info_module
from zflora_jax.experiments.info import describe
from zflora_jax.experiments.train import train
from zflora_jax.hf.load import locate
from zflora_jax.hf.peft import save_peft
from zflora_jax.hf.save import save_hf


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, base_dir: str) -> Path:
    """A finished run of four steps."""
    path = tmp_path_factory.mktemp("info") / "run"
    train(override(small_run(base_dir), {"train.steps": 4}), path, console=False)
    return path


def test_a_run(workdir, base_dir):
    facts = describe(workdir)
    report = json.loads((workdir / "report.json").read_text())
    assert (
        facts["kind"] == "run"
        and facts["base"] == base_dir
        and facts["method"] == "zflora-minimal"
        and facts["rank"] == 4
    )
    assert facts["widths"] == "residual 64 -> 68, head 16 -> 16, MLP 96 -> 100"
    assert (
        facts["trainable parameters"] == report["params_trainable"]
        and facts["base parameters"] == report["params_base"]
    )
    assert facts["steps"] == "4 of 4 saved" and facts["checkpoints"].endswith("4")
    assert (
        facts["base fingerprint"] == report["base_fingerprint"]
        and facts["seconds"] == report["seconds"]
    )
    assert (
        facts["eval loss"]
        == f"{report['validation_loss' if 'validation_loss' in report else 'test_loss']:.4f} at"
        " step 4"
    )
    assert all(isinstance(value, str | int | float) or value is None for value in facts.values())


def test_a_run_that_has_not_finished_or_lost_its_base(workdir, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((workdir / name).read_bytes())
    facts = describe(tmp_path)
    assert facts["steps"] == "0 of 4 saved" and "has not finished" in facts["report"]
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model": "/nowhere/at/all"}))
    assert (
        "unknown" in describe(tmp_path)["widths"]
        and describe(tmp_path)["method"] == "zflora-minimal"
    )


# Merged, widened without a residual state and with one.
@pytest.mark.parametrize("method", always(METHODS, {"lora", "ffba", "zflora-uniform"}.__contains__))
def test_an_export(method, tmp_path):
    model, adapter = tiny_model(), AdapterConfig(method, rank=4)
    fused = fuse(model, adapter, perturb(init_adapters(jax.random.key(0), model, adapter)))
    written = save_hf(tmp_path / "out", fused, base_fingerprint=trees.fingerprint(model.params))
    facts = describe(tmp_path / "out")
    assert facts["kind"] == "export" and facts["method"] == method and facts["dtype"] == "float32"
    assert facts["parameters"] == written["parameters"] and facts[
        "base fingerprint"
    ] == trees.fingerprint(model.params)
    assert facts["hidden_size"] == fused.config.hidden_size
    widened = METHODS[method].widens
    assert f"MLP {model.config.intermediate_size} -> {fused.config.intermediate_size}" in facts[
        "widths"
    ] and (widened or "residual 64 -> 64" in facts["widths"])


def test_an_adapter_directory(tmp_path):
    model, adapter = tiny_model(), AdapterConfig("lora", rank=4, alpha=10, targets="q|v")
    adapters = init_adapters(jax.random.key(0), model, adapter)
    save_peft(tmp_path / "a", model, adapter, adapters)
    facts = describe(tmp_path / "a")
    assert (
        facts["kind"] == "adapter (PEFT)"
        and facts["rank"] == 4
        and facts["alpha"] == 10
        and facts["targets"] == "q_proj, v_proj"
    )
    assert facts["parameters"] == size(adapters)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(settings | {"use_rslora": True, "rank_pattern": {"q_proj": 8}})
    )
    facts = describe(tmp_path / "a")
    assert (
        facts["use_rslora"] == "true"
        and facts["rank_pattern"] == '{"q_proj": 8}'
        and "use_dora" not in facts
    )


def test_models(base_dir):
    facts = describe(base_dir)
    assert facts["kind"] in ("export", "model") and facts["layers"] == 2
    facts = describe("llama-3.2-1b")
    assert (
        facts["kind"] == "model"
        and facts["hidden_size"] == preset("llama-3.2-1b").hidden_size
        and facts["parameters"] == 1_235_814_400
    )


@needs_smollm2
def test_a_gguf_file_tells_its_types(tmp_path):
    """Also that of a preset which a package brings."""
    path, _ = locate("smollm2-135m")
    shutil.copy(path, tmp_path / "copy.gguf")
    for source in ("smollm2-135m", str(tmp_path / "copy.gguf")):
        assert describe(source)["tensors"] == "210 Q4_1, 61 F32, 1 Q8_0"
    assert describe(tmp_path / "copy.gguf")["kind"] == "model (GGUF)"


def test_a_directory_of_nothing_known_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"no run .* it holds notes\.txt"):
        describe(tmp_path)


# --- the commands ---------------------------------------------------------------------------------


def test_info_prints_a_table_or_json(workdir, capsys):
    assert main(["info", str(workdir)]) == 0
    assert "zflora-minimal" in capsys.readouterr().out
    assert main(["info", str(workdir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(workdir)
    assert main(["info", str(workdir / "nothing")]) == 2
    assert "error: " in capsys.readouterr().err


def test_plot_draws_one_run_into_it_and_several_where_it_is_told(workdir, tmp_path, capsys):
    assert main(["plot", str(workdir)]) == 0
    assert (workdir / "curves.png").stat().st_size > 5000 and (workdir / "curves.svg").is_file()
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((workdir / "metrics.jsonl").read_bytes())
    assert main(["plot", str(workdir), str(other)]) == 2
    assert "--out PATH" in capsys.readouterr().err
    assert main(["plot", str(workdir), str(other), "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.svg").is_file()
    assert main(["plot", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err


def generated(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["generate", *argv, "--max-new-tokens", "8"]) == 0
    return capsys.readouterr().out


def test_generate_answers_a_prompt_a_file_and_a_conversation(
    workdir, capsys, tmp_path, monkeypatch
):
    one = generated(capsys, "--workdir", str(workdir), "--prompt", "2 + 2?")
    (tmp_path / "prompts.txt").write_text("2 + 2?\n\n3 + 3?\n")
    lines = [
        json.loads(line)
        for line in generated(
            capsys, "--workdir", str(workdir), "--file", str(tmp_path / "prompts.txt")
        ).splitlines()
    ]
    assert [line["prompt"] for line in lines] == ["2 + 2?", "3 + 3?"] and lines[0][
        "output"
    ] + "\n" == one
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 2?\n\n3 + 3?\n"))
    said = generated(capsys, "--workdir", str(workdir))
    assert said.startswith(one)
    args = _parser().parse_args(["generate", "--workdir", str(workdir)])
    assert generate._model_of(args).config.execution.packed  # one copy is in memory
    plain = generated(capsys, "--workdir", str(workdir), "--prompt", "2 + 2?", "--plain")
    assert plain != one


def test_every_line_of_a_file_is_one_prompt_whole_and_without_a_byte_order_mark(
    base_dir, capsys, tmp_path, monkeypatch
):
    """The prompts are read as data files are, from a file and from stdin alike."""
    prompts, path = ["2 + 2?", "a\u2028b\x0bc"], tmp_path / "prompts.txt"
    path.write_bytes(("\ufeff" + "\r\n".join(prompts) + "\r\n").encode())
    for file, stdin in ((str(path), b""), ("-", path.read_bytes())):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        said = generated(capsys, "--model", base_dir, "--file", file)
        assert [json.loads(line)["prompt"] for line in said.split("\n")[:-1]] == prompts
    path.write_bytes(b"caf\xe9")
    assert main(["generate", "--model", base_dir, "--file", str(path)]) == 2
    assert "not UTF-8 text" in capsys.readouterr().err


def test_generate_fuses_a_peft_adapter(tmp_path, base_dir, capsys):
    from zflora_jax.hf.load import load_model
    from zflora_jax.inference.text import generate

    model, adapter = load_model(base_dir), AdapterConfig("lora", rank=4)
    adapters = perturb(init_adapters(jax.random.key(0), model, adapter), std=0.5)
    save_peft(tmp_path / "a", model, adapter, adapters)
    want = generate(fuse(model, adapter, adapters), ["2 + 2?"], max_new_tokens=8, chat=True)[0]
    assert (
        generated(
            capsys, "--model", base_dir, "--adapter", str(tmp_path / "a"), "--prompt", "2 + 2?"
        )
        == want + "\n"
    )
    assert want + "\n" != generated(capsys, "--model", base_dir, "--prompt", "2 + 2?")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--file", "nowhere.txt"], "--file nowhere.txt does not exist"),
        (["--prompt", "a", "--top-k", "5"], "need a temperature above 0"),
        (["--prompt", "a", "--plain", "--system", "b"], "--system is a turn"),
        (["--plain"], "--plain continues a text"),
        (["--prompt", "a", "--checkpoint", "best"], "--checkpoint is of a run"),
        (["--prompt", "a", "--adapter", "nowhere"], "no PEFT directory"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_says_what_is_wrong(argv, message, base_dir, capsys):
    assert main(["generate", "--model", base_dir, *argv]) == 2
    assert message in capsys.readouterr().err


def test_only_a_run_has_checkpoints(base_dir, refused):
    message = refused("eval", "--model", base_dir, "--tasks", "arithmetic", "--checkpoint", "8")
    assert "--checkpoint is of a run: give its --workdir." in message


def test_typed_lines_end_with_the_input(monkeypatch):
    answers: list[Any] = ["\ufeffa", KeyboardInterrupt(), "b", EOFError()]

    def typed(_: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", typed)
    assert list(generate._typed()) == ["a", "b"]


def test_generate_asks_as_the_run_was_trained(workdir, tmp_path, capsys):
    """A run of alpaca prompts is asked in that form, with --prompt and --file alike; it holds no
    conversation.
    """
    from zflora_jax.data.prompts import render
    from zflora_jax.experiments.restore import load_fused
    from zflora_jax.inference.text import generate

    shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["prompt_style"] = "alpaca"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    model, _ = load_fused(tmp_path / "run")
    [want] = generate(model, [render(model.tokenizer, "alpaca", "2 + 2?")], max_new_tokens=8)
    given = ("--workdir", str(tmp_path / "run"), "--max-new-tokens", "8")
    assert main(["generate", *given, "--prompt", "2 + 2?"]) == 0
    assert capsys.readouterr().out == want + "\n"
    (tmp_path / "lines.txt").write_text("2 + 2?\n")
    assert main(["generate", *given, "--file", str(tmp_path / "lines.txt")]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "2 + 2?", "output": want}
    for wrong, message in (
        ([], "holds no conversation"),
        (["--prompt", "a", "--system", "b"], "data.prompt_style='alpaca'"),
    ):
        assert main(["generate", *given, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_an_export_says_its_base_and_figures(workdir, base_dir, tmp_path):
    assert main(["export", "--workdir", str(workdir), "--out", str(tmp_path / "out")]) == 0
    facts = describe(tmp_path / "out")
    report = json.loads((workdir / "report.json").read_text())
    split = "validation" if "validation_loss" in report else "test"
    assert (
        facts["base"] == Path(base_dir).name
        and facts["steps"] == 4
        and facts[f"{split} loss"] == report[f"{split}_loss"]
    )


def test_metrics_that_are_damaged_or_not_there_yet_are_said(workdir, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["plot", str(tmp_path)]) == 2
    assert "no numbers to draw" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"st\n{"step": 1, "split": "train", "loss": 1.0}\n')
    for command in ("plot", "info"):
        assert main([command, str(tmp_path)]) == 2
        assert "line 1: not a metrics record" in capsys.readouterr().err


def test_settings_of_an_adapter_that_are_not_usual_are_shown():
    shown = info_module._settings(DORA)
    assert (shown["use_dora"], shown["rank_pattern"]) == ("True", "{'q|down': 4}")
    assert shown.keys() == {
        *("method", "rank", "scale", "targets"),
        *("use_dora", "rank_pattern", "alpha_pattern"),
    }
