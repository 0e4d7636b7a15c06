"""The documentation: the site builds without a warning, every public name is in it, and its
commands and examples run, on a tiny model.
"""

import json
import re
import shlex
import subprocess
import sys

import jax
import pytest
from support.chat import SHORT, turn
from support.grids import always
from support.models import perturb
from support.paths import ROOT
from support.runs import choice
from support.tasks import write

import zflora_jax
from zflora_jax import AdapterConfig, init_adapters, load_model, save_peft
from zflora_jax.cli.main import COMMANDS, _parser, main
from zflora_jax.evaluation import export_gap as gap_module

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
# Only parsed here: they take too long even on a tiny model, or need a bucket or several processes.
PARSED_ONLY = ("zflora bench", "zflora sweep", "s3://", "--distributed", "--target", "--step")
MORE_RUNS = ("runs/b ", "runs/accelerator ", "runs/q ")  # other settings alone: in `make soak`
CONFIG = """
import dataclasses
from zflora_jax.config import DataConfig, EvalConfig, OptimConfig
from configs.quickstart import get_config as full

def get_config():
    data = DataConfig(full().data.task, batch_size=2, bucket_lengths=(448,), train_limit=12)
    run = dataclasses.replace(full(), model={model!r}, data=data)
    train = dataclasses.replace(run.train, steps=2, log_every=1, save_every=None)
    scored = EvalConfig(limit=2, batch_size=2, max_new_tokens=4)
    return dataclasses.replace(run, train=train, eval=scored, optim=OptimConfig(warmup_steps=1))
"""


def fences(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    return [
        line
        for block in fences(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


@pytest.fixture
def place(tmp_path, base_dir, monkeypatch):
    """A working directory as the documentation assumes it; returns what a text of it is here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gap_module, "ROWS", 1)
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "tiny.py").write_text(CONFIG.format(model=base_dir))
    (tmp_path / "chat.py").write_text(CONFIG.format(model=base_dir).replace("quickstart", "chat"))
    write(
        tmp_path / "CHATS" / "train.jsonl",
        *({"messages": [turn("user", f"{i}"), SHORT[1]]} for i in range(30)),
    )
    pair = {"chosen": [SHORT[1]], "rejected": [turn("assistant", "What?")]}
    write(
        tmp_path / "PAIRS.jsonl", *({"prompt": [turn("user", f"{i}")], **pair} for i in range(30))
    )
    for folder, count in (("DATA/ARC-Easy", 30), ("MY_DATA", 12)):
        (tmp_path / folder).mkdir(parents=True)
        for split, first in (("train", 100), ("test", 0)):
            (tmp_path / folder / f"{split}.json").write_text(
                json.dumps([choice(first + i) for i in range(count)])
            )
    model, adapter = load_model(base_dir), AdapterConfig("lora", rank=4)
    save_peft("PEFT_DIR", model, adapter, perturb(init_adapters(jax.random.key(0), model, adapter)))

    def here(text: str) -> str:
        return (
            text.replace("configs/quickstart.py", "tiny.py")
            .replace("configs/chat.py", "chat.py")
            .replace("model=MODEL", f"model={base_dir}")
            .replace("int4", "int8")  # the tiny heads are smaller than a group
            .replace("smollm2-135m", base_dir)
            .replace("lengths=(128,)", "lengths=(448,)")
            .replace("--limit 20", "--limit 4")
            .replace("steps=40", "steps=11")
            .replace("limit=64", "limit=2")
            .replace('"adapter.rank": [8, 16]', '"adapter.rank": [16]')
        )

    return here


@pytest.mark.parametrize("few", always([True, False], bool))
def test_commands_run(place, capsys, few):
    """Each once, in the order of the pages: README's runs are there for the others."""
    for line in dict.fromkeys(line for page in PAGES for line in commands(page)):
        # A plan reads no weights: it is made in full.
        words = shlex.split(line if line.startswith("zflora plan") else place(line), comments=True)
        argv = {
            "python": ["train" if "train.py" in line else "eval", *words[2:]],
            "zflora": words[1:],
        }[words[0]]
        argv = [word for word in argv if not word.startswith("train.steps=")]
        if argv[0] == "train":
            argv = [re.sub(r"^(data\.batch_size)=.*", r"\1=2", word) for word in argv]
        if argv[0] == "generate" and "--max-new-tokens" not in argv:
            argv += ["--max-new-tokens", "8"]
        if any(part in line for part in (*PARSED_ONLY, *(MORE_RUNS if few else ()))):
            _parser().parse_args(argv)
        else:
            assert main(argv) == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", [page for page in PAGES if fences(page, "python")])
def test_examples_run(page, place):
    names: dict[str, object] = {}
    for block in fences(page, "python"):
        exec(compile(place(block), page, "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_says_what_it_is(page):
    """bash and python are run; json is a row; text is what cannot be run here: installations,
    several hosts, other software.
    """
    opened = re.findall(r"^```(.*)$", PAGES[page], flags=re.MULTILINE)[::2]
    assert set(opened) <= {"bash", "json", "python", "text"}
    for block in fences(page, "text"):
        assert not re.search(r"^(zflora |python eval)", block, flags=re.MULTILINE), (
            f"can be run: {block}"
        )


def test_the_site_builds_without_a_warning_and_names_everything_public(tmp_path):
    site = tmp_path / "site"  # not --quiet, which would let warnings of docstrings pass
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = "".join(path.read_text("utf-8") for path in site.glob("api/**/index.html"))
    commands = (site / "commands" / "index.html").read_text("utf-8")
    for name in (*(command.__name__.rpartition(".")[2] for command in COMMANDS), "bench-latency"):
        assert f'id="zflora-{name}"' in commands and 'class="stacked"' in commands
    found = (site / "search" / "search_index.json").read_text("utf-8")
    for words in ("Gradient checkpointing", "train.epochs", "target_modules"):
        assert words in found and r"\\|" not in found  # cells without their escapes
    own = {
        name: getattr(getattr(zflora_jax, name), "__name__", name) for name in zflora_jax.__all__
    }
    missing = [  # a name of before stands for the one that it has now
        name
        for name, now in own.items()
        if not re.search(rf'id="zflora_jax\.[\w.]*\b{now}"', reference)
    ]
    assert not missing
