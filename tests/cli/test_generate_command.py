"""`zflora generate`: one prompt, a file; what an error or a signal leaves; its messages."""

import io
import itertools
import json
import os
import shutil
import signal
from typing import Any

import jax
import pytest
from support.models import perturb
from support.tasks import write

from zflora_jax import AdapterConfig, NonFiniteError, fuse, generate, load_model, save_hf, save_peft
from zflora_jax.adapters.init import init_adapters
from zflora_jax.cli.main import main
from zflora_jax.data.prompts import render
from zflora_jax.experiments.restore import load_fused
from zflora_jax.inference import text


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `zflora generate` with short answers; returns what it prints."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        asked = [*map(str, argv), "--max-new-tokens", "8", "--batch-size", "1"]
        assert main(["generate", *asked]) == 0
        return capsys.readouterr().out

    return run


def test_one_prompt_and_a_file(trained_dir, said, tmp_path):
    run = ("--workdir", trained_dir)
    one = said(*run, "--prompt", "2 + 2?")
    (tmp_path / "prompts.txt").write_text("2 + 2?\n\n3 + 3?\n")
    lines = said(*run, "--file", tmp_path / "prompts.txt").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["2 + 2?", "3 + 3?"]
    assert json.loads(lines[0])["output"] + "\n" == one
    assert said(*run, "--prompt", "2 + 2?", "--plain") != one


def test_every_line_of_a_file_is_one_prompt_whole_and_without_a_byte_order_mark(
    base_dir, said, refused, tmp_path, monkeypatch
):
    """The prompts are read as data files are, from a file and from stdin alike."""
    prompts, path = ["2 + 2?", "a\u2028b\x0bc"], tmp_path / "prompts.txt"
    path.write_bytes(("\ufeff" + "\r\n".join(prompts) + "\r\n").encode())
    (pipe, end), data = os.pipe(), path.read_bytes()
    assert os.write(end, data) and os.close(end) is None
    for file, stdin in ((path, b""), ("-", data), (f"/dev/fd/{pipe}", b"")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        lines = said("--model", base_dir, "--file", file).split("\n")[:-1]
        assert [json.loads(line)["prompt"] for line in lines] == prompts
    os.close(pipe)
    path.write_text("hi\nhi\n")
    drawn = said("--model", base_dir, "--file", path, "--temperature", 99).splitlines()
    assert len(set(drawn)) == 2  # in batches of one line
    path.write_text(f"hi\n\n{'x' * 600}\n")
    said_so = refused("generate", "--model", base_dir, "--file", path)
    assert "line 3 of --file has" in said_so and "with --max-new-tokens=" in said_so
    path.write_bytes(b"caf\xe9")
    assert "not UTF-8 text" in refused("generate", "--model", base_dir, "--file", path)


def test_a_lora_is_fused_unless_the_model_is_widened_already(base_dir, said, refused, tmp_path):
    """An adapter merged by addition left an ordinary model."""
    model, lora = load_model(base_dir), AdapterConfig("lora", rank=4)
    adapters = perturb(init_adapters(jax.random.key(0), model, lora), std=0.5)
    save_peft(tmp_path / "peft", model, lora, adapters)
    want = generate(fuse(model, lora, adapters), ["2 + 2?"], max_new_tokens=8, chat=True)[0]
    asks = ("--prompt", "2 + 2?", "--adapter", tmp_path / "peft", "--model")
    assert said(*asks, base_dir) == want + "\n" != said("--model", base_dir, *asks[:2])
    for method in ("lora", "zflora-minimal"):
        of = AdapterConfig(method, rank=2)
        start = init_adapters(jax.random.key(1), model, of)
        save_hf(tmp_path / method, fuse(model, of, perturb(start)))
    said(*asks, tmp_path / "lora")
    assert "has an adapter fused in" in refused("generate", *asks, tmp_path / "zflora-minimal")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--file", "nowhere.txt"], "--file nowhere.txt does not exist; give a text file"),
        (["--file", "."], "--file . is a directory; give a text file"),
        (["--prompt", "a", "--top-k", "5"], "need a temperature above 0"),
        (["--prompt", "a", "--checkpoint", "best"], "--checkpoint chooses a saved step of a run"),
        (["--prompt", "a", "--adapter", "nowhere"], "no PEFT directory"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", "x" * 600], "exceeds the model's context"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said(argv, message, base_dir, refused):
    assert message in refused("generate", "--model", base_dir, *argv)


@pytest.mark.parametrize("style", ["alpaca", "plain"])
def test_a_run_is_asked_as_it_was_trained(style, config_file, trained_dir, said, refused, tmp_path):
    """In the form of its prompts, or with texts as they are."""
    prompt, folder = "2 + 2?", tmp_path / "run"
    if style == "plain":
        rows = [{"prompt": f"{i}: ", "completion": "x"} for i in range(30)]
        own = ["data.task=rows", f"data.data_dir={write(tmp_path / 'train.jsonl', *rows)}"]
        given = ["--config", config_file, "--workdir", str(folder), "--set", *own]
        assert main(["train", *given]) == 0
    else:
        shutil.copytree(trained_dir, folder)
        config = (folder / "config.json").read_text()
        changed = config.replace('"prompt_style": "chat"', f'"prompt_style": "{style}"')
        (folder / "config.json").write_text(changed)
    model, _ = load_fused(folder)
    written = prompt if style == "plain" else render(model.tokenizer, style, prompt)
    [want] = generate(model, [written], max_new_tokens=8)
    run = ("--workdir", folder)
    assert said(*run, "--prompt", prompt) == want + "\n"
    (tmp_path / "lines.txt").write_text(f"{prompt}\n")
    lines = said(*run, "--file", tmp_path / "lines.txt")
    assert json.loads(lines) == {"prompt": prompt, "output": want}


# --- errors and signals ---------------------------------------------------------------------------


@pytest.fixture
def asks(base_dir, tmp_path):
    """A command over three lines, a batch each."""
    (tmp_path / "lines.txt").write_text("a longer prompt\nhi\nmedium one")
    given = ["generate", "--model", base_dir, "--file", str(tmp_path / "lines.txt")]
    return [*given, "--max-new-tokens", "4", "--batch-size", "1"]


def after(monkeypatch, done, action):
    """Lets `action` run after `done` batches."""
    calls, answered = itertools.count(), text.generate
    monkeypatch.setattr(
        text, "generate", lambda *given: action() if next(calls) == done else answered(*given)
    )


@pytest.mark.parametrize("done", [1, 2])
def test_an_error_loses_no_answer(done, asks, monkeypatch, capsys):
    assert main(asks) == 0
    want = capsys.readouterr().out.splitlines()
    prompts = [json.loads(line)["prompt"] for line in want]
    assert prompts == ["a longer prompt", "hi", "medium one"]

    def fail():
        raise NonFiniteError("the logits are NaN")

    after(monkeypatch, done, fail)
    assert main(asks) == 3
    found = capsys.readouterr()
    assert found.out.splitlines() == want[:done]
    assert "the logits are NaN" in found.err


def test_sigterm_loses_no_answer(asks, monkeypatch, capsys):
    """As a scheduler ends a job."""

    def ended():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("SIGTERM had no effect")

    after(monkeypatch, 1, ended)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main(asks)
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["prompt"] == "a longer prompt"
