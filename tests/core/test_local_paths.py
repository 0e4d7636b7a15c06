"""Where results may be written: local directories, and object storage for what a run writes. Other
URLs, and those of commands that write to directories only, are refused at the start, not made into
a directory called "gs:".
"""

import contextlib
import os
from pathlib import Path

import pytest

from zflora_jax import ConfigError, load_model, locked, save_hf
from zflora_jax.cli.main import main
from zflora_jax.core.storage import as_path
from zflora_jax.hf.gguf.write import gguf_target
from zflora_jax.reporting.files import local_path

URL, OTHER = "gs://bucket/run", "hdfs://host:1/run"
CONFIG = "from zflora_jax import RunConfig\ndef get_config():\n    return RunConfig()\n"


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """Nothing at all may be made in the working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert os.listdir(folder) == []


STORES = ["file:///tmp/x", OTHER, Path(OTHER), "az://b/x", "s3n://b/x"]
EMPTY = (
    as_path,
    local_path,
    save_hf,
    *(lambda path, _, f=f: f(path) for f in (load_model, locked)),
)


@pytest.mark.parametrize(
    ("check", "path", "said"),
    [
        *((local_path, p, "is a URL: .* Give a path of") for p in (URL, Path(URL), *STORES)),
        (lambda path, _: gguf_target(path, "f16"), f"{URL}.gguf", "is a URL: .* Give a path of"),
        *((as_path, p, r"is a URL of \w+: a directory, s3://bucket") for p in STORES),
        (lambda path, _: save_hf(path, None), OTHER, "is a URL of hdfs"),
        *((check, "", "is empty: give a path") for check in EMPTY),
        *(
            (as_path, p, r"expected (s3|gs)://BUCKET/FOLDER")
            for p in ("s3://bucket", "gs://bucket/", "s3:/bucket", "gs://")
        ),
    ],
)
def test_urls_and_empty_paths_are_refused(check, path, said):
    with pytest.raises(ConfigError, match=said), contextlib.ExitStack() as stack:
        stack.enter_context(check(path, "workdir"))


@pytest.mark.parametrize(
    "path", ["runs/a", "/tmp/a b", "C:/runs", "~/x", "a:b", "./gs://bucket", Path("runs")]
)
def test_local_paths_are_taken(path):
    assert local_path(path, "workdir") == Path(path) == as_path(path)


@pytest.mark.parametrize(
    "command",
    [
        f"train --config CONFIG --workdir {OTHER}",
        f"train --resume --workdir {OTHER}",
        f"sweep --config CONFIG --workdir {URL}",
        f"eval --model nowhere --out {OTHER}",
        f"export --workdir nowhere --out {OTHER}",
        f"plan --config CONFIG --out {OTHER}",
        f"quickstart --workdir {URL}",
        f"bench latency --out {URL}",
    ],
)
def test_every_command_that_writes(command, tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    assert main(command.replace("CONFIG", str(tmp_path / "config.py")).split()) == 2
    assert f"{URL if URL in command else OTHER} is a URL" in capsys.readouterr().err
