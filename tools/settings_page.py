"""`python tools/settings_page.py` writes docs/settings.md: every setting of a run, from the
dataclasses that declare them.
"""

from __future__ import annotations

from pathlib import Path

from zflora_jax.core.settings import sections
from zflora_jax.reporting.tables import markdown_table

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
INTRODUCTION = """# Settings

Every setting of a run. `--set KEY=VALUE` changes it on the command line (`zflora train --help`
lists the same), `zflora_jax.RunConfig` holds it in Python, `config.json` in a workdir keeps it.
`python tools/settings_page.py` writes this page.
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
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
