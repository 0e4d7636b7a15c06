"""The notebooks run from top to bottom on a tiny model, and what is committed has its outputs."""

import ast
import inspect
import os
import re
import warnings
from operator import attrgetter

import jax
import nbformat
import pytest
from support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
stem = attrgetter("stem")
# What replaces the settings of the cell tagged "parameters". The byte tokenizer's prompts are long.
TINY = {
    "MODEL": None,  # the tiny model's directory
    "STEPS": 4,
    "BATCH": 2,
    "LENGTHS": (320, 384),
    "ROWS": 3,
    "GRID": {
        "adapter.method": ["lora", "zflora-minimal"],
        "adapter.rank": [2],
        "adapter.targets": ["all"],
        "optim.learning_rate": [1e-3],
    },
    "RANKS": (2, 4),
    "PROMPT": 8,
    "NEW_TOKENS": 4,
    "REPEATS": 1,
}


def with_tiny_settings(path, base_dir):
    """The notebook, a cell of small settings inserted after its own."""
    notebook = nbformat.read(path, as_version=4)
    (at,) = [
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    ]
    given = notebook.cells[at].source
    tiny = TINY | {"MODEL": "tiny" if path.stem.endswith("latency") else base_dir}
    changes = "\n".join(f"{name} = {value!r}" for name, value in tiny.items() if name in given)
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(changes))
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_what_a_notebook_uses_is_there(path):
    """Names that it imports, and keywords that it gives to functions of the project."""
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    names, calls = {}, []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), names)
        elif isinstance(node, ast.Call) and re.fullmatch(r"[\w.]+", ast.unparse(node.func)):
            calls.append(node)
    checked = 0
    for call in calls:
        root = ast.unparse(call.func).split(".")[0]
        module = getattr(names.get(root), "__module__", getattr(names.get(root), "__name__", ""))
        if module.startswith("zflora_jax"):
            function = eval(ast.unparse(call.func), names)
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(function).bind(*call.args, **keywords)
            checked += 1
    assert checked >= 3


@pytest.mark.soak  # minutes
@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_the_cells_of_a_notebook_run(path, base_dir, tmp_path, monkeypatch, capsys):
    """Within this process, which has the package and its programs already."""
    monkeypatch.chdir(tmp_path)
    names, pictures = {"__name__": "notebook"}, 0
    with (
        warnings.catch_warnings(action="default"),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for cell in with_tiny_settings(path, base_dir).cells:
            if cell.cell_type != "code":
                continue
            *body, last = ast.parse(cell.source).body or [ast.Pass()]
            if not isinstance(last, ast.Expr):
                body, last = [*body, last], None
            exec(compile(ast.Module(body, []), path.name, "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), path.name, "eval"), names)
                pictures += bool(getattr(value, "_repr_png_", lambda: None)())
    # A kernel shows the figures that a cell leaves open; here the files that it saves count.
    assert pictures or any(tmp_path.rglob("*.png"))
    if path.stem == "01_finetune":
        written = capsys.readouterr().out
        assert "bit-identical" in written and "LlamaForCausalLM" in written
        assert (tmp_path / "runs" / "notebook-export" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_what_is_committed_was_run_in_order(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (
        str(ROOT) not in path.read_text() and os.path.expanduser("~") + "/" not in path.read_text()
    )
