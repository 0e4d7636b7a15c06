"""`zflora generate`: answers of a file that an error stops, its messages, the memory it takes."""

import json
import os
import signal

import pytest

from zflora_jax.cli import generate
from zflora_jax.cli.main import _parser, main
from zflora_jax.core.errors import NonFiniteError
from zflora_jax.inference import decode


@pytest.mark.parametrize("done", [1, 2])
def test_an_error_loses_no_answer(done, base_dir, tmp_path, monkeypatch, capsys):
    """Batches go by length: the line that fails may stand before one that is answered."""
    lines = ["a longer prompt", "hi", "medium one"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    asks = ["generate", "--model", base_dir, "--file", str(tmp_path / "lines.txt")]
    asks += ["--max-new-tokens", "4", "--batch-size", "1"]
    assert main(asks) == 0
    want = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in want] == lines
    answered = decode.answer_batches

    def stopping(*given):
        batches = answered(*given)
        for _ in range(done):
            yield next(batches)
        raise NonFiniteError("the logits are NaN")

    monkeypatch.setattr(decode, "answer_batches", stopping)
    assert main(asks) == 3
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == done and set(said.out.splitlines()) < set(want)
    assert "the logits are NaN" in said.err


def test_sigterm_loses_no_answer(base_dir, tmp_path, monkeypatch, capsys):
    """As a scheduler ends a job: the answer that waits behind a missing one is printed."""
    (tmp_path / "lines.txt").write_text("a longer prompt\nhi")
    answered = decode.answer_batches

    def stopped(*given):
        yield next(answered(*given))
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("SIGTERM had no effect")

    monkeypatch.setattr(decode, "answer_batches", stopped)
    asks = ["generate", "--model", base_dir, "--file", str(tmp_path / "lines.txt")]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main([*asks, "--max-new-tokens", "4", "--batch-size", "1"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["hi"]


def test_an_answer_is_printed_once_those_before_it_are_there(
    base_dir, tmp_path, monkeypatch, capsys
):
    (tmp_path / "lines.txt").write_text("ab\ncd\n")
    answered, said = decode.answer_batches, []

    def watched(*given):
        for batch in answered(*given):
            yield batch
            said.append(capsys.readouterr().out)

    monkeypatch.setattr(decode, "answer_batches", watched)
    asks = ["generate", "--model", base_dir, "--file", str(tmp_path / "lines.txt")]
    assert main([*asks, "--max-new-tokens", "4", "--batch-size", "1"]) == 0
    assert [json.loads(line)["prompt"] for line in said] == ["ab", "cd"]


def test_a_line_that_does_not_fit_is_named(base_dir, tmp_path, refused):
    (tmp_path / "lines.txt").write_text("ok\n\n\n" + "x" * 600)
    said = refused("generate", "--model", base_dir, "--file", tmp_path / "lines.txt")
    assert "lines.txt, line 4 has " in said and "with --max-new-tokens=256 that" in said


def test_the_model_is_packed_as_it_is_loaded(base_dir):
    """So that one copy of it is in memory."""
    args = _parser().parse_args(["generate", "--model", base_dir])
    assert generate._model_of(args).config.execution.packed
