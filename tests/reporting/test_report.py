import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zflora_jax.reporting import files, provenance, tables


def test_environment_names_the_versions_and_no_path_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["/opt/x/bin/zflora", "bench", "--out", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path}/dump")
    env = provenance.environment()
    assert env["jax"] == jax.__version__
    assert env["backend"] == "cpu" and env["device_count"] >= 1 and env["cpu_count"] >= 1
    line = provenance.origin_line(env | {"commit": None, "dirty": True})
    assert f"commit unknown with local changes; device cpu, {env['cpu_count']} CPUs" in line
    assert f" CPUs ({env['cpu']}); jax {jax.__version__}; " in line
    text = json.dumps(env)
    private = (str(tmp_path), str(Path(provenance.__file__).parent), "/opt/x", socket.gethostname())
    assert not any(part in text for part in private) and env["xla_flags"] == "--xla_dump_to=dump"


def test_command_line_is_what_one_would_type(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    argv = ["/venv/bin/zflora", "export", "--workdir", f"{tmp_path}/runs/a", "--out=/data/out"]
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.command_line() == "zflora export --workdir runs/a --out=out"
    monkeypatch.setattr(sys, "argv", [f"{tmp_path}/train.py", "--set", "model=org/name"])
    assert provenance.command_line() == "python train.py --set model=org/name"
    spec = SimpleNamespace(name="demo.__main__")  # python -m demo
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert provenance.command_line() == "python -m demo --set model=org/name"
    text = "org/name ./a/b ../a ~/a https://example.org/a/b train.steps=50 a,b"
    assert provenance.relative_paths(text) == text


def _git(root, *args):
    command = ["git", "-C", root, "-c", "user.name=t", "-c", "user.email=t@t", *args]
    subprocess.run(command, check=True, capture_output=True)


def test_git_state(tmp_path):
    root = tmp_path.resolve()
    assert provenance._git_state(root) == (None, None)
    _git(root, "init")
    assert provenance._git_state(root) == (None, None)  # no commit yet
    (root / "train.py").write_text("1\n")
    _git(root, "add", "train.py")
    _git(root, "commit", "-m", "one")
    commit, dirty = provenance._git_state(root)
    assert len(commit) == 40 and dirty is False
    (root / "notes.txt").write_text("not code")
    assert provenance._git_state(root) == (commit, False)
    (root / "train.py").write_text("2\n")
    assert provenance._git_state(root) == (commit, True)
    (root / "site-packages").mkdir()  # an installed copy inside a repository is not that repository
    assert provenance._git_state(root / "site-packages") == (None, None)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "r.json"
    values = {"a": np.float32(1.5), "b": jnp.arange(3), "c": (1, True, None), "d": float("nan")}
    files.write_json(path, values | {"e": Path("x/y"), "f": {"g": np.int64(2)}})
    wanted = {"a": 1.5, "b": [0, 1, 2], "c": [1, True, None], "d": None, "e": "x/y", "f": {"g": 2}}
    assert json.loads(path.read_text()) == wanted
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    monkeypatch.setattr(provenance.os, "fsync", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == wanted
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_markdown_table():
    rows = [
        {"method": "a|b", "params": 4884480, "loss": 0.328912, "ok": True},
        {"method": "full", "params": None, "loss": 12345.6, "ok": False},
    ]
    columns = {"method": "method", "params": "trainable", "loss": "loss", "ok": "fused"}
    assert tables.markdown_table(rows, columns).splitlines() == [
        "| method | trainable | loss | fused |",
        "|---|---:|---:|---|",
        "| a\\|b | 4,884,480 | 0.3289 | yes |",
        "| full | - | 12,346 | no |",
    ]
    assert tables.markdown_table([], ["a", "b"]) == "| a | b |\n|---|---|"
