"""`zflora generate`: one prompt, a file, a conversation; what an error or a signal leaves; its
messages.
"""

import io
import itertools
import json
import os
import shutil
import signal
from typing import Any

import jax
import pytest
from support.byte_tokenizer import byte_tokenizer
from support.models import perturb, untied
from support.tasks import write

from zflora_jax import AdapterConfig, NonFiniteError, fuse, generate, load_model, save_hf, save_peft
from zflora_jax.adapters.init import init_adapters
from zflora_jax.cli import generate as command
from zflora_jax.cli.main import main
from zflora_jax.data.prompts import render, render_turns
from zflora_jax.experiments.restore import load_fused
from zflora_jax.inference import decode, text
from zflora_jax.inference.generation_config import GenerationConfig, Sampler


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `zflora generate` with short answers; returns what it prints."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        asked = [*map(str, argv), "--max-new-tokens", "8", "--batch-size", "1"]
        assert main(["generate", *asked]) == 0
        return capsys.readouterr().out

    return run


def test_one_prompt_a_file_and_a_conversation(trained_dir, said, tmp_path, monkeypatch):
    run = ("--workdir", trained_dir)
    one = said(*run, "--prompt", "2 + 2?")
    (tmp_path / "prompts.txt").write_text("2 + 2?\n\n3 + 3?\n")
    lines = said(*run, "--file", tmp_path / "prompts.txt").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["2 + 2?", "3 + 3?"]
    assert json.loads(lines[0])["output"] + "\n" == one
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 2?\n\n3 + 3?\n"))
    assert said(*run).startswith(one)
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
        (["--prompt", "a", "--plain", "--system", "b"], "need the style 'chat'"),
        (["--plain"], "need the style 'chat'"),
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
    """In the form of its prompts, or with texts as they are; it holds no conversation."""
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
    for wrong in ([], ["--prompt", "a", "--system", "b"]):
        assert f"the style '{style}' (that of the run)" in refused("generate", *run, *wrong)


# --- errors and signals ---------------------------------------------------------------------------


@pytest.fixture
def asks(base_dir, tmp_path):
    """A command over three lines, a batch each. Batches go by length: a line that is not answered
    may stand before one that is.
    """
    (tmp_path / "lines.txt").write_text("a longer prompt\nhi\nmedium one")
    given = ["generate", "--model", base_dir, "--file", str(tmp_path / "lines.txt")]
    return [*given, "--max-new-tokens", "4", "--batch-size", "1"]


def after(monkeypatch, done, action):
    """Lets `action` run after `done` batches."""
    batches = decode.batches

    def stopping(*given):
        yield from itertools.islice(batches(*given), done)
        action()

    monkeypatch.setattr(decode, "batches", stopping)


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
    assert len(found.out.splitlines()) == done and set(found.out.splitlines()) < set(want)
    assert "the logits are NaN" in found.err


def test_sigterm_loses_no_answer(asks, monkeypatch, capsys):
    """As a scheduler ends a job: the answer that waits behind a missing one is printed."""

    def ended():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("SIGTERM had no effect")

    after(monkeypatch, 1, ended)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        main(asks)
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["hi"]


# --- conversations --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker() -> Any:
    model = untied(num_layers=1, max_position_embeddings=128)
    model.tokenizer = byte_tokenizer()
    return model


@pytest.fixture
def talk(talker, capsys):
    """Returns what a conversation of some lines prints."""

    def run(*lines: str, opening: Any = (), sampler: Sampler | None = None, tokens: int = 30):
        capsys.readouterr()
        config = GenerationConfig(tokens, sampler)
        command._converse(talker, lines, list(opening), config, "2026-11-26")
        return capsys.readouterr().out

    return run


LONG = "word " * 8


def test_a_conversation_gives_the_turns_before(talker, talk):
    turns = [{"role": "system", "content": "be brief"}]
    found = talk("hi", "", "and?", opening=turns, tokens=10)
    for line in ("hi", "and?"):
        turns.append({"role": "user", "content": line})
        prompt = render_turns(talker.tokenizer, turns, "2026-11-26")
        answer = generate(talker, [prompt], max_new_tokens=10)[0]
        turns.append({"role": "assistant", "content": answer})
    assert found == "".join(f"{t['content']}\n" for t in turns if t["role"] == "assistant")


def test_reset_and_quit(talk):
    first = talk("hi", tokens=10)
    found = talk("one", "/reset", "hi", "/quit", "never", tokens=10)
    assert found == talk("one", tokens=10) + first


def test_turns_that_no_longer_fit_are_left_out_and_said(talk):
    """And a turn that does not fit alone leaves the conversation as it is."""
    found = talk(LONG, LONG, LONG)
    assert "(the context is full: 2 old turns are left out)\n" in found
    assert found.endswith(talk(LONG))  # only the last turn was left
    note = "(that is too long: --max-new-tokens leaves 118 tokens)\n"
    found = talk("hi", "word " * 40, "hi", tokens=10)
    assert note in found and found.replace(note, "") == talk("hi", "hi", tokens=10)


def test_a_turn_asked_again_is_drawn_anew_where_no_other_is_left(talk):
    found = talk(LONG, LONG, LONG, sampler=Sampler(1.0))
    answers = [part.rpartition("left out)\n")[2] for part in found.rstrip("\n").split("\n(")]
    assert len(answers) == len(set(answers)) == 3
    assert found == talk(LONG, LONG, LONG, sampler=Sampler(1.0))


def test_a_stopped_answer_ends_and_the_conversation_goes_on(talk, monkeypatch):
    heard: list[Any] = []

    def interrupted(model: Any, turns: Any, *_: Any, **__: Any) -> Any:
        heard.append([turn["content"] for turn in turns])
        yield "half"
        if len(heard) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(text, "stream", interrupted)
    assert talk("a", "b") == "half (stopped)\nhalf\n"
    assert heard[1] == ["a", "half", "b"]


def test_typed_lines_end_with_the_input(monkeypatch):
    answers: list[Any] = ["\ufeffa", KeyboardInterrupt(), "b", EOFError()]

    def typed(_: str) -> str:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", typed)
    assert list(command._typed()) == ["a", "b"]
