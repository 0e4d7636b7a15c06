"""`python tools/settings_page.py` writes docs/settings.md: every setting of a run, from the
dataclasses that declare them, and their names in PEFT, TRL and transformers.
"""

from __future__ import annotations

from pathlib import Path

from zflora_jax.core.foreign import FOREIGN
from zflora_jax.core.settings import sections
from zflora_jax.reporting.tables import markdown_table

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
INTRODUCTION = """# Settings

Every setting of a run. `--set KEY=VALUE` changes it on the command line (`zflora train --help`
lists the same), `zflora_jax.RunConfig` holds it in Python, `config.json` in a workdir keeps it.
`python tools/settings_page.py` writes this page.
"""
FOREIGN_SECTION = """## Coming from PEFT and TRL

Names of PEFT, TRL, transformers and Cloud TPU, and this project's names for the same things. An
error about an unknown setting shows its row of this table.
[How to](howto.md#come-from-peft-and-trl) has the steps.
"""


def page() -> str:
    """The text of docs/settings.md."""
    parts = [INTRODUCTION]
    for section in sections():
        rows = [
            {
                "name": f"`{setting.name}`",
                "values": setting.allowed,
                "default": setting.default,
                "meaning": setting.meaning.replace("*", r"\*"),
            }
            for setting in section.settings
        ]
        table = markdown_table(rows, ["name", "values", "default", "meaning"])
        parts.append(f"## {section.name}\n\n{section.title}\n\n{table}\n")
    rows = [
        {
            "PEFT, TRL, transformers": ", ".join(f"`{name}`" for name in names.split(", ")),
            "zflora_jax": here,
        }
        for names, here in FOREIGN.items()
    ]
    table = markdown_table(rows, ["PEFT, TRL, transformers", "zflora_jax"])
    return "\n".join([*parts, FOREIGN_SECTION, f"{table}\n"])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
