"""The sizes that the repository keeps to: new scope pays with old."""

import shutil
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT

# folders -> lines of their .py files at most
LINES = {("zflora_jax",): 24_000, ("tests",): 20_000, ("benchmarks", "studies", "tools"): 6_000}
LINES |= {("zflora_vllm",): 900}
PACKAGE_CHARACTERS = 1_036_000
RESULT_FILES, RESULT_BYTES = 40, 2_000_000
DOC_PAGES, CONTRIBUTING_LINES = 12, 150


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("folders", LINES, ids="+".join)
def test_lines_of_code(folders: tuple[str, ...]) -> None:
    lines = sum(path.read_text("utf-8").count("\n") for path in sources(*folders))
    assert 0 < lines <= LINES[folders], f"{lines} lines"


def test_characters_of_the_package() -> None:
    characters = sum(len(path.read_text("utf-8")) for path in sources("zflora_jax"))
    assert characters <= PACKAGE_CHARACTERS, f"{characters} characters"


def test_results() -> None:
    """Pictures in SVG are drawn next to those in PNG and are not committed."""
    files = [path for path in (ROOT / "results").rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".svg"]
    assert len(files) <= RESULT_FILES, f"{len(files)} files"
    size = sum(path.stat().st_size for path in files)
    assert size <= RESULT_BYTES, f"{size} bytes"


def test_pages() -> None:
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert len(pages) <= DOC_PAGES, pages
    lines = (ROOT / "CONTRIBUTING.md").read_text("utf-8").count("\n")
    assert lines <= CONTRIBUTING_LINES, f"{lines} lines"


@pytest.mark.skipif(not shutil.which("git"), reason="asks git")
def test_no_other_link_is_tracked() -> None:
    """`zflora_jax/configs` makes configs/ a part of the package; a user's .venv is none."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    links = {line.split("\t")[1] for line in listed.stdout.splitlines() if line[:6] == "120000"}
    assert links <= {"zflora_jax/configs"}  # none without a repository
