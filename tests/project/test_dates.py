"""What data must not depend on: the clock (the day that a chat template is told is a setting of the
run), and the locale.
"""

from __future__ import annotations

import ast
import datetime
import json

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_trees_equal
from support.paths import ROOT
from support.runs import quiet_train, saved_base, small_run

from zflora_jax.cli.main import main
from zflora_jax.core.errors import Preempted
from zflora_jax.core.fields import ConfigError, override
from zflora_jax.core.model import Model
from zflora_jax.core.run_config import DataConfig, RunConfig
from zflora_jax.data import dates
from zflora_jax.data.encoding import encode_prompts, tokenize_examples
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.prompts import render
from zflora_jax.data.tasks import Example
from zflora_jax.evaluation import records
from zflora_jax.evaluation.task import evaluate
from zflora_jax.experiments.base import load_base
from zflora_jax.experiments.restore import load_fused
from zflora_jax.inference.text import generate
from zflora_jax.parallel.distributed import StopSignals
from zflora_jax.training.workdir import read_config

# As Llama 3.2's: the date stands in a system turn that every conversation begins with.
TEMPLATE = (
    '{% if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif'
    " %}[system]Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n{{"
    " eos_token }}{% for message in messages %}{{ '[' + message['role'] + ']' + message['content']"
    " + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


class Clock(datetime.datetime):
    """A clock that stands still."""

    day = datetime.date(2026, 1, 31)

    @classmethod
    def now(cls, tz=None):
        return cls(cls.day.year, cls.day.month, cls.day.day, 23, 59, tzinfo=tz)


@pytest.fixture
def clock(monkeypatch):
    """Sets the day of transformers' clock, and ours."""
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    def set_day(year: int, month: int, day: int) -> str:
        Clock.day = datetime.date(year, month, day)
        monkeypatch.setattr(dates, "today", lambda: Clock.day.isoformat())
        return Clock.day.isoformat()

    return set_day


@pytest.fixture(scope="module")
def dated_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model directory whose tokenizer files hold the template."""
    return saved_base(
        tmp_path_factory.mktemp("dated") / "model", byte_tokenizer(chat_template=TEMPLATE)
    )


@pytest.fixture
def run(dated_base: str) -> RunConfig:
    return override(small_run(dated_base), {"train.steps": 6, "data.bucket_lengths": [384, 448]})


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    monkeypatch.setattr(StopSignals, "requested", lambda self, n: n == step)


def prompts_of(run: RunConfig, model: Model) -> list[list[int]]:
    return encode_prompts(
        load_mixture(run.data, run.eval.split, 4), model.tokenizer, "chat", run.data.date
    )


# --- the template ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        "\n  " + TEMPLATE,
        "{{- 'a' }}\n\n" + TEMPLATE,
        "{% if true %}\n" + TEMPLATE + "{% endif %}",
    ],
)
def test_a_pinned_prompt_is_the_one_of_that_day(template, clock):
    """transformers with its clock set to the day gives the same text, and the clock does not change
    the pinned one.
    """
    tokenizer = byte_tokenizer(chat_template=template)
    clock(2026, 2, 3)
    want = render(tokenizer, "chat", "Hi")
    clock(2027, 12, 31)
    assert "03 Feb 2026" in want and "31 Dec 2027" in render(tokenizer, "chat", "Hi")
    assert render(tokenizer, "chat", "Hi", date="2026-02-03") == want


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%d",
        "%d %B %Y",
        "%B %-d, %Y",
        "%A %e %b",
        "%%d %j 100%%",
        "%c|%x|%X|%p|%H:%M",
        "%D %F %y %U %w %Q",
    ],
)
def test_every_form_of_a_date(form, clock):
    tokenizer = byte_tokenizer(
        chat_template="{{ strftime_now('"
        + form
        + "') }}{% macro day() %} {{ strftime_now('%d') }}{% endmacro %}{{ day() }}"
    )
    for day in ("2026-02-03", "2024-02-29", "2027-11-30"):
        said = render(tokenizer, "chat", "Hi", date=day)
        assert said == datetime.datetime.fromisoformat(day).strftime(form + " %d")


def test_templates_by_name_and_templates_without_a_date():
    tokenizer = byte_tokenizer(chat_template={"default": TEMPLATE, "tool_use": "no"})
    assert "03 Feb 2026" in render(tokenizer, "chat", "Hi", date="2026-02-03")
    assert dates.pin_date("{{ messages }}", "2026-02-03") == "{{ messages }}"


@pytest.mark.parametrize("day", ["2026-02-30", "20260203", "yesterday", "2026-2-3", ""])
def test_a_date_that_is_none_is_refused(day):
    with pytest.raises(ConfigError, match=r"data.date=.*must be a day as YYYY-MM-DD"):
        DataConfig(date=day)


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_is_resumed_on_another_day_bit_for_bit(run, tmp_path, monkeypatch, clock):
    day = clock(2026, 1, 31)
    whole = quiet_train(run, tmp_path / "whole")
    stop_after(monkeypatch, 3)
    with pytest.raises(Preempted):
        quiet_train(run, tmp_path / "stopped")
    stop_after(monkeypatch, None)
    clock(2026, 2, 1)
    resumed = quiet_train(run, tmp_path / "stopped")
    assert (
        resumed.report["resumed_from"] == 3
        and resumed.report["data_fingerprint"] == whole.report["data_fingerprint"]
    )
    assert_trees_equal(resumed.adapters, whole.adapters)
    assert resumed.report["test_loss"] == whole.report["test_loss"]
    assert read_config(tmp_path / "stopped").data.date == resumed.run.data.date == day
    with pytest.raises(ConfigError, match=r"data\.date: '2026-01-31' there, '2026-02-01' now"):
        quiet_train(override(run, {"data.date": "2026-02-01"}), tmp_path / "stopped")


def test_evaluation_and_generation_see_the_prompts_of_training(
    run, tmp_path, monkeypatch, capsys, clock
):
    """The next day, by the command line too: what answers are generated from begins as the training
    rows do.
    """
    clock(2026, 1, 31)
    trained = quiet_train(run, tmp_path / "run")
    config = read_config(tmp_path / "run")
    clock(2026, 2, 1)
    row = tokenize_examples(
        load_mixture(config.data, run.eval.split, 1), trained.model.tokenizer, config.data
    ).rows[0]
    [prompt, *_] = prompts_of(config, trained.model)
    assert row.tokens[: len(prompt)].tolist() == prompt and b"31 Jan 2026" in bytes(
        t for t in prompt if t < 256
    )

    seen: list[str] = []
    real = records.encode_prompts
    monkeypatch.setattr(
        records,
        "encode_prompts",
        lambda *a: [seen.append(bytes(t for t in p if t < 256).decode()) or p for p in real(*a)],
    )
    assert (
        main(
            [
                "eval",
                "--workdir",
                str(tmp_path / "run"),
                "--limit",
                "2",
                "--set",
                "eval.max_new_tokens=2",
            ]
        )
        == 0
    )
    assert seen and all("31 Jan 2026" in text for text in seen)
    summary = json.loads(next((tmp_path / "run" / "eval").glob("summary-*.json")).read_text())
    assert summary["config"]["data"]["date"] == "2026-01-31"
    loss = evaluate(
        override(config, {"eval.generate": False}),
        load_fused(tmp_path / "run")[0],
        console=False,
    )["loss"]
    assert loss == pytest.approx(trained.report["test_loss"], rel=1e-5)

    told: list[str | None] = []
    monkeypatch.setattr(
        "zflora_jax.inference.text.render",
        lambda *a, date=None: (told.append(date), render(*a, date=date))[1],
    )
    monkeypatch.setattr(
        "zflora_jax.inference.text.render_turns",
        lambda t, turns, date=None: (told.append(date), render(t, "chat", "Hi", date=date))[1],
    )
    (tmp_path / "prompts.txt").write_text("Hi\n")
    for arguments in (["--prompt", "Hi"], ["--file", str(tmp_path / "prompts.txt")]):
        assert (
            main(
                [
                    "generate",
                    "--workdir",
                    str(tmp_path / "run"),
                    "--max-new-tokens",
                    "1",
                    *arguments,
                ]
            )
            == 0
        )
    assert len(told) >= 2 and set(told) == {"2026-01-31"}
    capsys.readouterr()


def test_a_model_is_evaluated_today_and_that_is_recorded(run, tmp_path, clock):
    day = clock(2026, 3, 4)
    model = load_base(run)
    evaluate(
        override(run, {"eval.generate": False, "eval.limit": 1}),
        model,
        out=tmp_path / "out",
        console=False,
    )
    assert json.loads((tmp_path / "out.json").read_text())["config"]["data"]["date"] == day
    assert generate(model, ["Hi"], chat=True, max_new_tokens=2) == generate(
        model, ["Hi"], chat=True, max_new_tokens=2, date=day
    )


def test_examples_cut_to_fit_are_cut_for_their_own_day(run, clock):
    """The length of a prompt depends on the day that it names."""
    from zflora_jax.data.encoding import fit_documents

    tokenizer = byte_tokenizer(chat_template="{{ strftime_now('%A') }}{{ messages[0]['content'] }}")
    example = Example("q", "t", "1", input="document " * 20, document=True)
    for day in ("2026-02-02", "2026-02-04"):  # Monday, Wednesday
        [prompt] = encode_prompts(
            fit_documents([example], tokenizer, "chat", 60, day), tokenizer, "chat", day
        )
        assert len(prompt) == 60


# --- the locale -----------------------------------------------------------------------------------


def without_encoding(code: str) -> list[str]:
    """The calls that read or write text in the encoding of the locale."""
    found = []
    for node in (n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call)):
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        binary = any(
            isinstance(a, ast.Constant) and isinstance(a.value, str) and "b" in a.value
            for a in node.args
        )
        opens = isinstance(node.func, ast.Name) and name == "open" and not binary
        if (opens or name in ("read_text", "write_text")) and not any(
            word.arg == "encoding" for word in node.keywords
        ):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("folder", ["zflora_jax", "tools", "benchmarks", "configs"])
def test_text_files_are_utf_8_whatever_the_locale(folder):
    assert without_encoding(
        "open(p); p.read_text(); open(p, 'wb'); p.write_text(s, encoding='utf-8')"
    ) == ["open(p)", "p.read_text()"]
    assert {
        str(p): calls
        for p in (ROOT / folder).rglob("*.py")
        if (calls := without_encoding(p.read_text(encoding="utf-8")))
    } == {}
