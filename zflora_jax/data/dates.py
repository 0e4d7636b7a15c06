"""The date that a chat template is told, one per run: some templates write it into every prompt."""

from __future__ import annotations

import dataclasses
from datetime import date as Date, datetime

from zflora_jax.core.run_config import RunConfig

# Names in English, whatever the locale.
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = (
    "January February March April May June July August September October November December".split()
)


def today() -> str:
    """Returns the local date, such as "2026-11-26", which transformers tells a chat template."""
    return Date.today().isoformat()


def dated(run: RunConfig, date: str | None = None) -> RunConfig:
    """Sets data.date of a run that has none, to `date` or else today."""
    if run.data.date is not None:
        return run
    return dataclasses.replace(run, data=dataclasses.replace(run.data, date=date or today()))


def pin_date(template: str, date: str) -> str:
    """Makes a Jinja chat template see midnight of a date such as "2026-11-26", whatever the clock
    and the locale of this machine; a template that does not ask for the date is returned unchanged.

    transformers gives templates the function `strftime_now`. An argument of apply_chat_template
    cannot replace it (transformers 5.24 turns functions into text), but a macro of that name before
    the template takes precedence.
    """
    if "strftime_now" not in template:
        return template
    steps = [("%%", r"\x00"), *_directives(date).items(), (r"\x00", "%")]
    filters = "".join(f'|replace("{directive}","{value}")' for directive, value in steps)
    # transformers drops the line break after a block, so the template itself begins as before.
    return "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n" + template


def _directives(date: str) -> dict[str, str]:
    """Returns strftime's directives of `date` in the C locale: {"%d": "26", "%B": "November"}."""
    moment = datetime.fromisoformat(date)
    plain = {code: moment.strftime(f"%{code}") for code in "CDFGHIMRSTUVWYdefgjmuwyzZ"}
    unpadded = {f"-{code}": plain[code].lstrip(" 0") or "0" for code in "HIMSdejmy"}
    day, month = _DAYS[moment.weekday()], _MONTHS[moment.month - 1]
    named = {"A": day, "a": day[:3], "B": month, "b": month[:3], "h": month[:3], "x": plain["D"]}
    named |= {"X": plain["T"], "p": "AM", "r": f"{plain['T'].replace('00', '12', 1)} AM"}
    named["c"] = f"{day[:3]} {month[:3]} {plain['e']} {plain['T']} {plain['Y']}"
    return {f"%{code}": value for code, value in (plain | unpadded | named).items()}
