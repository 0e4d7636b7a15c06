"""The package's structure: cheap imports, no heavy library before it is needed, dependencies in one direction, files of a readable size."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
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

# Lowest first. A module imports from its own layer and from lower ones; a package name stands for all modules in it.
LAYERS = [
    ("trees", "fields", "textfile", "model_config", "config", "report", "trackers", "metrics", "progress", "starts", "data.dates"),
    ("hosts", "cache"),
    ("sharding",),
    ("mesh",),
    ("adapters.methods",),  # the table of methods: integers only, so that the model can read its widths from it
    ("products", "devices"),
    ("layers", "model", "vocabulary"),
    ("adapters.init",),  # names and shapes of the adapter tree, which the model checks its `adapters` collection against
    ("llama",),
    ("adapters",),
    ("decode", "beam"),
    ("loss", "optim"),
    ("trainer",),
    ("checkpoint", "data", "likelihood", "hf"),
    ("contamination", "text", "serving"),
    ("evals", "run_report", "base", "gap_prompts"),
    ("run",),
    ("scorecard",),
    ("comparison",),
    ("compare_page",),
    ("bench", "compare", "grid", "plots", "planner", "info"),
    ("quickstart",),
    ("commands",),
    ("generate_command",),
    ("cli",),
]
# Narrower than the layers say: all that these may import of the package.
ONLY = {
    "trees": set(),
    "fields": set(),
    "textfile": {"fields"},
    "model_config": {"fields"},
    "config": {"fields", "model_config"},
    "report": {"fields"},
    "metrics": {"report", "textfile", "trackers"},
    "trackers": {"fields", "report"},
    "starts": {"report", "textfile"},
    "run_report": {"config", "fields", "hosts", "report", "starts"},
    "data.dates": {"config"},
    "adapters.methods": {"config", "fields", "model_config"},
    "adapters.init": {"trees", "config", "model_config", "adapters.methods", "devices", "model"},
    "hosts": {"fields"},
    "cache": set(),
    "products": set(),
    "devices": set(),
    "loss": set(),
    "optim": {"trees", "config"},
    "plots": {"metrics", "report"},
}
APART = [("hf", "data"), ("data", "hf"), ("hf", "checkpoint"), ("data", "checkpoint"), ("trainer", "report")]  # (importer, imported) that must not be


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


# --- cost ---------------------------------------------------------------------------------------------------------


def test_import_takes_less_than_1_5_seconds_beyond_jax():
    """Also with the core names touched, which brings flax and optax in. The best of three, because other processes share the machine."""
    code = """
import time, json
start = time.perf_counter(); import jax
after_jax = time.perf_counter(); import zflora_jax
after_import = time.perf_counter()
zflora_jax.Llama, zflora_jax.fuse, zflora_jax.AdapterConfig, zflora_jax.init_adapters, zflora_jax.generate, zflora_jax.NonFiniteError
print(json.dumps([after_jax - start, after_import - after_jax, time.perf_counter() - after_jax]))
"""
    runs = [json.loads(run_python(code)) for _ in range(3)]
    bare, used = (min(run[i] for run in runs) for i in (1, 2))
    print(f"jax {min(run[0] for run in runs):.2f} s; beyond it: import {bare:.3f} s, with the core names {used:.2f} s")
    assert bare < 0.1 and used < 1.5, runs


def test_no_heavy_library_is_imported_before_it_is_needed():
    """Modules are imported from low to high; the first that brings one is named."""
    modules = [
        "llama",
        "adapters.fuse",
        "decode",
        "trainer",
        "checkpoint",
        "hf.load",
        "hf.save",
        "hf.peft",
        "data.tasks",
        "run",
        "compare",
        "grid",
        "info",
        "cli",
    ]
    heavy = {"torch", "transformers", "tensorflow", "tensorflow_datasets", "grain", "tokenizers", "gguf", "huggingface_hub", "matplotlib", "orbax"}
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


@pytest.mark.parametrize("module", ["zflora_jax", "zflora_jax.config", "zflora_jax.adapters.methods", "zflora_jax.cli"])
def test_what_needs_no_jax_does_not_import_it(module):
    """A wrong flag or key is answered at once."""
    assert run_python(f"import sys, {module}; print('jax' in sys.modules)").strip() == "False"


# --- direction ----------------------------------------------------------------------------------------------------


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules of the package that the file imports, "adapters.fuse"; those inside functions too unless `top_level`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            whole = node.module or ""
            parts = [f"{whole}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("zflora_jax.") in MODULES else whole for name in parts]
        else:
            continue
        found |= {name.removeprefix("zflora_jax.") for name in names if name.startswith("zflora_jax.")}
        assert "zflora_jax" not in names, f"{path.name}: imports the public names; import the module that has them"
    return found


def layer(module: str) -> int:
    """The layer of the longest listed name that is the module or a package around it."""
    places = [(len(name), i) for i, names in enumerate(LAYERS) for name in names if module == name or module.startswith(f"{name}.")]
    assert places, f"module {module} is in no layer: give it a place in LAYERS"
    return max(places)[1]


def within(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_from_a_higher_layer(module):
    for imported in imports(MODULES[module]):
        assert imported in MODULES, f"{module} imports {imported}, which does not exist"
        assert layer(imported) <= layer(module), f"{module} imports {imported}, which is above it"
        assert imported != "cli"
        assert not any(within(module, a) and within(imported, b) for a, b in APART), f"{module} imports {imported}"
    if module in ONLY:
        assert imports(MODULES[module]) <= ONLY[module]


def test_the_check_of_directions_can_fail(tmp_path):
    (tmp_path / "low.py").write_text("def f():\n    from zflora_jax.run import train\n    from zflora_jax import trees\n")
    assert imports(tmp_path / "low.py") == {"run", "trees"} and imports(tmp_path / "low.py", top_level=True) == set()
    assert layer("adapters.fuse") > layer("llama") > layer("adapters.methods") and layer("hf.save") > layer("trainer")


def test_layers_name_modules_that_exist():
    for name in [n for names in LAYERS for n in names] + list(ONLY):
        assert name in MODULES, name


def test_imports_have_no_cycle():
    graph = {module: imports(path, top_level=True) for module, path in MODULES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(MODULES)


# --- size and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["__init__", *sorted(MODULES)])
def test_files_are_short_and_say_what_they_are_for(module):
    path = MODULES.get(module, PACKAGE / "__init__.py")
    text = path.read_text(encoding="utf-8")
    code = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 350, f"{len(code)} lines of code; split what no one reads in one sitting"
    assert not code or ast.get_docstring(ast.parse(text)), "no docstring at the top"


def test_public_names_resolve_and_are_documented():
    assert zflora_jax.__all__ == sorted(set(zflora_jax.__all__)) and set(zflora_jax.__all__) <= set(dir(zflora_jax))
    for name in zflora_jax.__all__:
        value = getattr(zflora_jax, name)
        if inspect.isclass(value) or callable(value):
            doc = inspect.getdoc(value)
            assert doc and not doc.startswith(f"{name}("), f"{name} has no docstring"  # dataclasses get their signature as one
            assert value.__module__.startswith("zflora_jax."), name


def test_static_and_lazy_names_agree():
    """What type checkers see (TYPE_CHECKING) is what is loaded at run time."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    static = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(static) == zflora_jax.__all__
    for name, module in static.items():
        assert getattr(importlib.import_module(module or ""), name) is getattr(zflora_jax, name)


def test_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"has no attribute 'fusee'; public names: .*\bfuse\b"):
        zflora_jax.fusee  # noqa: B018
