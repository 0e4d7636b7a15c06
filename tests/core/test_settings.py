"""The list of settings: complete, explained, and the same in the help and in docs/settings.md."""

import dataclasses
import re

import pytest
import settings_page

from zflora_jax.cli.eval import OF_MODEL
from zflora_jax.cli.main import main
from zflora_jax.config import METHODS, RunConfig
from zflora_jax.core import trees
from zflora_jax.core.fields import ConfigError, override, to_dict
from zflora_jax.core.foreign import FOREIGN
from zflora_jax.core.settings import sections
from zflora_jax.reporting.trackers import TRACKERS
from zflora_jax.training.optim import OPTIMIZERS

SETTINGS = {s.name: s for section in sections() for s in section.settings}


def test_every_field_of_a_run_is_listed_with_a_meaning():
    fields = trees.flatten(to_dict(RunConfig()))
    assert sorted(SETTINGS) == sorted(name.replace("/", ".") for name in fields)
    for name, setting in SETTINGS.items():
        assert len(setting.meaning) >= 12 and setting.meaning.endswith("."), name
        assert setting.allowed, name
    defaults = {name: setting.default for name, setting in SETTINGS.items()}
    assert override(RunConfig(), defaults) == RunConfig()  # written as --set takes them


def test_methods_trackers_and_optimizers_are_named():
    assert SETTINGS["adapter.method"].allowed.split(" | ") == list(METHODS)
    for name, table in (("train.report_to", TRACKERS), ("optim.optimizer", OPTIMIZERS)):
        for row in table:
            assert re.search(rf"\b{row}\b", SETTINGS[name].meaning), f"{row}: name it in {name}"
    named = re.findall(r"(?:adapter|data|optim|train|quantize)\.\w+", " ".join(FOREIGN.values()))
    assert named and set(named) <= set(SETTINGS)


def test_a_wrong_value_in_python_is_named_with_its_section():
    run = RunConfig()
    for section in (f.name for f in dataclasses.fields(run)):
        config = getattr(run, section)
        for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
            with pytest.raises(ConfigError, match=rf"^{section}\.{field.name}="):
                dataclasses.replace(config, **{field.name: object()})


# --- the help -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "begin"),
    [
        *((command, "") for command in ("train", "sweep", "plan", "quickstart")),
        ("eval", ("data.", "eval.", "mesh.", *OF_MODEL)),
        ("generate", "mesh."),
        ("export", "mesh."),
    ],
)
def test_help_lists_the_settings_that_a_command_takes(command, begin, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    for name, setting in SETTINGS.items():
        line = f"    {name} ({setting.allowed}; default {setting.default})\n        "
        assert (line + setting.meaning in text) == name.startswith(begin), name


def test_the_page_is_up_to_date():
    """If not: python tools/settings_page.py"""
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()
