"""The pages that benchmarks/pages.py lists are those that the writers make of their JSON files."""

from __future__ import annotations

import subprocess
import sys

from support.paths import ROOT


def test_every_page_is_what_its_json_file_gives() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "pages.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
