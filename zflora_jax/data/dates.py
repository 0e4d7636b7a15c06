"""The date for chat templates, one per run: some templates write it into every prompt."""

from __future__ import annotations

import dataclasses
from datetime import date as Date, datetime

from zflora_jax.core.run_config import RunConfig


def today() -> str:
    """Returns the local date, such as "2026-11-26", which transformers gives a chat template."""
    return Date.today().isoformat()


def dated(run: RunConfig, date: str | None = None) -> RunConfig:
    """Sets data.date of a run that has none, to `date` or else today."""
    if run.data.date is not None:
        return run
    return dataclasses.replace(run, data=dataclasses.replace(run.data, date=date or today()))


def pin_date(template: str, date: str) -> str:
    """Makes a Jinja chat template see midnight of a date such as "2026-11-26", whatever the clock;
    a template that does not ask for the date is returned unchanged.

    transformers gives templates the function `strftime_now`. An argument of apply_chat_template
    cannot replace it (transformers 5.24 turns functions into text), but a macro of that name before
    the template takes precedence.
    """
    if "strftime_now" not in template:
        return template
    codes = [*"ABCDFGHIMRSTUVWXYabcdefghjmprsuwxyzZ", *(f"-{code}" for code in "HIMSdejmy")]
    moment = datetime.fromisoformat(date)
    values = [(f"%{code}", moment.strftime(f"%{code}")) for code in codes]
    steps = [("%%", r"\x00"), *values, (r"\x00", "%")]
    filters = "".join(f'|replace("{directive}","{value}")' for directive, value in steps)
    # transformers drops the line break after a block, so the template itself begins as before.
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n" + template
