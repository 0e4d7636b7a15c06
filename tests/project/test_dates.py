"""Data does not depend on the clock: the day that a chat template is told is a setting."""

import datetime
import json

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.checks import assert_trees_equal
from support.runs import quiet_train, saved_base, small_run

from zflora_jax import ConfigError, DataConfig, RunConfig, evaluate, override
from zflora_jax.cli.main import main
from zflora_jax.core.errors import Preempted
from zflora_jax.data import dates
from zflora_jax.data.encoding import encode_prompts, fit_documents, tokenize_examples
from zflora_jax.data.mixture import load_mixture
from zflora_jax.data.prompts import encode_prompt_texts, render
from zflora_jax.data.tasks import Example
from zflora_jax.evaluation import records
from zflora_jax.experiments.restore import load_fused
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
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of a model directory whose tokenizer files hold the template."""
    folder = tmp_path_factory.mktemp("dated") / "model"
    base = saved_base(folder, byte_tokenizer(chat_template=TEMPLATE))
    return override(small_run(base), {"train.steps": 6, "data.bucket_lengths": [384, 448]})


# --- the template ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template", [TEMPLATE, "\n  " + TEMPLATE, "{% if true %}\n" + TEMPLATE + "{% endif %}"]
)
def test_a_pinned_prompt_is_the_one_of_that_day(template, clock):
    """transformers with its clock set to the day gives the same text, and the clock does not change
    the pinned one.
    """
    tokenizer = byte_tokenizer(chat_template={"default": template, "tool_use": "no"})
    clock(2026, 2, 3)
    want = render(tokenizer, "chat", "Hi")
    clock(2027, 12, 31)
    assert "03 Feb 2026" in want and "31 Dec 2027" in render(tokenizer, "chat", "Hi")
    assert render(tokenizer, "chat", "Hi", date="2026-02-03") == want
    assert dates.pin_date("{{ messages }}", "2026-02-03") == "{{ messages }}"


FORMS = ("%Y-%m-%d", "%d %B %Y", "%B %-d, %Y", "%A %e %b", "%%d %j 100%%", "%c|%x|%X|%p|%H:%M")


@pytest.mark.parametrize("form", [*FORMS, "%D %F %y %U %w %Q"])
def test_every_form_of_a_date(form):
    asked = f"{{{{ strftime_now('{form}') }}}}{{% macro day() %}} {{{{ strftime_now('%d') }}}}"
    tokenizer = byte_tokenizer(chat_template=asked + "{% endmacro %}{{ day() }}")
    for day in ("2026-02-03", "2024-02-29", "2027-11-30"):
        said = render(tokenizer, "chat", "Hi", date=day)
        assert said == datetime.datetime.fromisoformat(day).strftime(form + " %d")


def test_a_date_that_is_none_is_refused():
    for day in ("2026-02-30", "20260203", "yesterday", "26.11.2026", ""):
        with pytest.raises(ConfigError, match=r"data.date=.*must be a day as YYYY-MM-DD.*or None"):
            DataConfig(date=day)


def test_examples_cut_to_fit_are_cut_for_their_own_day():
    """The length of a prompt depends on the day that it names."""
    tokenizer = byte_tokenizer(chat_template="{{ strftime_now('%A') }}{{ messages[0]['content'] }}")
    example = Example("q", "t", "1", input="document " * 20, document=True)
    for day in ("2026-02-02", "2026-02-04"):  # Monday, Wednesday
        cut = fit_documents([example], tokenizer, "chat", 60, day)
        assert [len(ids) for ids in encode_prompts(cut, tokenizer, "chat", day)] == [60]


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.soak  # a long run
def test_a_run_is_resumed_on_another_day_bit_for_bit(run, tmp_path, monkeypatch, clock):
    day = clock(2026, 1, 31)
    whole = quiet_train(run, tmp_path / "whole")
    monkeypatch.setattr(StopSignals, "requested", lambda self, n: n == 3)
    with pytest.raises(Preempted):
        quiet_train(run, tmp_path / "stopped")
    monkeypatch.setattr(StopSignals, "requested", lambda self, n: False)
    clock(2026, 2, 1)
    resumed = quiet_train(run, tmp_path / "stopped")
    assert resumed.report["resumed_from"] == 3
    for key in ("data_fingerprint", "test_loss"):
        assert resumed.report[key] == whole.report[key]
    assert_trees_equal(resumed.adapters, whole.adapters)
    assert read_config(tmp_path / "stopped").data.date == resumed.run.data.date == day
    with pytest.raises(ConfigError, match=r"data\.date: '2026-01-31' there, '2026-02-01' now"):
        quiet_train(override(run, {"data.date": "2026-02-01"}), tmp_path / "stopped")


def text_of(ids: list[int]) -> str:
    return bytes(t for t in ids if t < 256).decode()


def test_evaluation_and_generation_see_the_prompts_of_training(run, tmp_path, monkeypatch, clock):
    """The next day, by the command line too: what answers are generated from begins as the training
    rows do.
    """
    workdir = tmp_path / "run"
    clock(2026, 1, 31)
    trained = quiet_train(run, workdir)
    config, tokenizer = read_config(workdir), trained.model.tokenizer
    clock(2026, 2, 1)
    examples = load_mixture(config.data, run.eval.split, 1)
    row = tokenize_examples(examples, tokenizer, config.data).rows[0]
    [prompt] = encode_prompts(examples, tokenizer, "chat", config.data.date)
    assert row.tokens[: len(prompt)].tolist() == prompt and "31 Jan 2026" in text_of(prompt)

    seen: list[str] = []

    def recorded(*args):
        found = encode_prompts(*args)
        seen.extend(map(text_of, found))
        return found

    monkeypatch.setattr(records, "encode_prompts", recorded)
    words = ["eval", "--workdir", str(workdir), "--limit", "2"]
    assert main([*words, "--set", "eval.max_new_tokens=2"]) == 0
    assert seen and all("31 Jan 2026" in text for text in seen)
    summary = json.loads(next((workdir / "eval").glob("summary-*.json")).read_text())
    assert summary["config"]["data"]["date"] == "2026-01-31"
    of_loss = override(config, {"eval.generate": False})
    loss = evaluate(of_loss, load_fused(workdir)[0], console=False)["loss"]
    assert loss == pytest.approx(trained.report["test_loss"], rel=1e-5)

    given: list[str] = []

    def encoded(tokenizer, texts):
        given.extend(texts)
        return encode_prompt_texts(tokenizer, texts)

    monkeypatch.setattr("zflora_jax.inference.text.encode_prompt_texts", encoded)
    words = ["generate", "--workdir", str(workdir), "--max-new-tokens", "1"]
    (tmp_path / "prompts.txt").write_text("Hi\n")
    assert main([*words, "--file", str(tmp_path / "prompts.txt")]) == 0
    assert given and all("31 Jan 2026" in text for text in given)
