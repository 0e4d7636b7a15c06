"""Hook of mkdocs: makes a page of all commands, divides docs/api.md into a page per section, and
marks the tables whose rows become blocks on a phone (docs/site.css).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from zflora_jax.cli.main import _parser
from zflora_jax.reporting.tables import markdown_table


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages to those of docs/."""
    api = files.get_file_from_path("api.md")
    text = Path(api.abs_src_path).read_text(encoding="utf-8")
    pages = {"commands.md": commands_page()} | api_pages(text)
    files.remove(api)
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Marks the tables of settings and commands, and writes `q|v`, not its escape in tables."""
    if page.file.src_uri in ("settings.md", "commands.md"):
        html = html.replace("<table>", '<div class="stacked"><table>')
        html = html.replace("</table>", "</table></div>")
    return re.sub(r"(<td.*?</td>)", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)


def api_pages(text: str) -> dict[str, str]:
    """File name -> text: of each section of docs/api.md, and of an overview that links them."""
    overview, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    pages = {}
    for section in sections:
        title, _, body = section.partition("\n")
        name = f"api/{title.lower().replace(' ', '-')}.md"
        pages[name] = f"# API: {title.lower()}\n{body}"  # other pages have the same titles
        paths = re.findall(r"^::: (\S+)", body, re.MULTILINE)
        names = [f"[`{path.rpartition('.')[2]}`][{path}]" for path in paths]
        overview += f"- [{title}]({name}): {', '.join(names)}\n"
    return pages | {"api.md": overview}


def commands_page() -> str:
    """Every command, with its options."""
    parts = [
        "# Commands\n\n`zflora COMMAND --help` shows the same. In a clone, `python train.py` is"
        " `zflora train`, and `python eval.py` is `zflora eval`. A command with `--set` takes the"
        " [settings](settings.md)."
    ]
    for parser in _commands(_parser()):
        rows = [
            {"option": f"`{name}`", "meaning": (action.help or "").replace("*", r"\*")}
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
            for name in [_name(action)]
        ]
        table = markdown_table(rows, ["option", "meaning"]) if rows else ""
        parts.append(f"## {parser.prog}\n\n{parser.description}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from _commands(command)


def _name(action: argparse.Action) -> str:
    """An option as one types it: --config FILE."""
    value = action.metavar or (action.choices and "|".join(map(str, action.choices))) or ""
    return f"{(action.option_strings or [''])[-1]} {value}".strip() or action.dest
