"""The package's structure: cheap imports, no heavy library too early, readable files and prose."""

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zflora_jax

PACKAGE = Path(zflora_jax.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}
# Words of this project alone; fragments in place of the phrases of `Args:`
UNCLEAR = re.compile(r"(?i)\b(beside|likewise|see to it)\b|(?-i:^ +\*{0,2}\w+: (of|as|in) )", re.M)


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout


# --- cost -----------------------------------------------------------------------------------------


def test_import_takes_less_than_1_5_seconds_beyond_jax():
    """Also with the core names touched, which brings flax and optax in. Seconds of the processor,
    the better of two, because other processes share the machine.
    """
    code = """
import time, json
start = time.process_time(); import jax
after_jax = time.process_time(); import zflora_jax
after_import = time.process_time()
zflora_jax.Llama, zflora_jax.fuse, zflora_jax.AdapterConfig, zflora_jax.init_adapters
zflora_jax.generate, zflora_jax.NonFiniteError
print(json.dumps([after_jax - start, after_import - after_jax, time.process_time() - after_jax]))
"""
    runs = [json.loads(run_python(code)) for _ in range(2)]
    jax, bare, used = (min(run[i] for run in runs) for i in range(3))
    print(f"jax {jax:.2f} s; beyond it: import {bare:.3f} s, with the core names {used:.2f} s")
    assert bare < 0.1 and used < 1.5, runs


def test_no_heavy_library_is_imported_before_it_is_needed():
    """Modules are imported from low to high; the first that brings one is named."""
    modules = (
        "nn.llama adapters.fuse inference.decode training.trainer training.checkpoint hf.load"
        " hf.save hf.peft data.tasks experiments.train experiments.restore experiments.export"
        " experiments.grid reporting.plots cli.main"
    ).split()
    heavy = set(
        "torch transformers tensorflow tensorflow_datasets grain tokenizers gguf huggingface_hub"
        " matplotlib tensorboardX s3fs gcsfs botocore".split()
    )
    code = f"""
import importlib, sys, zflora_jax
for module in {modules!r}:
    importlib.import_module("zflora_jax." + module)
    found = sorted({heavy!r} & set(sys.modules))
    if found:
        print(module, "brings", *found)
        break
"""
    assert run_python(code).strip() == ""


def test_what_needs_no_jax_does_not_import_it():
    """A wrong flag, key or setting is answered at once."""
    config = PACKAGE.parent / "configs" / "quickstart.py"
    words = ["--config", str(config), "--set", "train.stesp=9"]
    code = f"""
import sys, zflora_jax, zflora_jax.core.run_config
from zflora_jax.cli.main import main
print(*(main([command, *{words!r}]) for command in ("plan", "quickstart")), "jax" in sys.modules)
"""
    assert run_python(code).split() == ["2", "2", "False"]


# --- size and names -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["__init__", *sorted(MODULES)])
def test_functions_are_short_and_files_say_what_they_are_for(module):
    path = MODULES.get(module, PACKAGE / "__init__.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{path}:{node.lineno}: {node.name} has {lines} lines"
    named = not (ast.get_docstring(tree) or "What ").startswith("What ")
    assert not tree.body or named, f"{path}:1: begin with a docstring that names what is here"


def test_prose_is_clear():
    texts = "zflora_jax/**/*.py zflora_vllm/*.py docs/*.md README.md CONTRIBUTING.md".split()
    paths = [path for pattern in texts for path in PACKAGE.parent.glob(pattern)]
    found = [(path.name, m[0]) for path in paths for m in UNCLEAR.finditer(path.read_text("utf-8"))]
    assert len(paths) > 100 and not found


def test_public_names_resolve_and_are_documented():
    names = zflora_jax.__all__
    assert len(set(names)) == len(names) and set(names) <= set(dir(zflora_jax))
    for name in names:
        value = getattr(zflora_jax, name)
        if inspect.isclass(value) or callable(value):
            doc = inspect.getdoc(value)
            # Dataclasses get their signature as one.
            assert doc and not doc.startswith(f"{name}("), f"{name} has no docstring"
            assert value.__module__.startswith("zflora_jax."), name
        if inspect.isfunction(value) and inspect.signature(value).parameters:
            assert "Args:" in doc, name


def test_every_name_of_the_stub_is_where_it_says():
    """`__init__.pyi` is the one list: what type checkers read is what is loaded at run time."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    listed = {a.name: f"zflora_jax.{node.module}" for node in imports for a in node.names}
    assert sorted(listed) == zflora_jax.__all__
    for name, module in listed.items():
        assert getattr(importlib.import_module(module), name) is getattr(zflora_jax, name)
