"""The paper's tables (configs/paper/tables.py): equal budgets, published settings, and a run of
each of their shapes on a tiny model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.grids import always
from support.models import tiny_model
from support.paths import ROOT

from zflora_jax.adapters.counts import count_params
from zflora_jax.cli.inputs import load_config
from zflora_jax.cli.main import main
from zflora_jax.core.fields import override
from zflora_jax.core.presets import preset
from zflora_jax.data.tasks import TASKS
from zflora_jax.experiments.plan import stored_bytes
from zflora_jax.hf.save import save_hf

CONFIG = str(ROOT / "configs" / "paper" / "tables.py")

TINY = """
from dataclasses import replace
from zflora_jax.cli.inputs import load_config

def get_sweep():
    plans = load_config({config!r}, "get_sweep")
    (plan,) = [plan for plan in plans if plan.name == {name!r}]
    base = replace(plan.base, optim=replace(plan.base.optim, warmup_steps=0))
    plan = replace(plan, base=base, learning_rates=(3e-4,), pick_steps=2)
    return replace(plan, scoring=replace(plan.scoring, max_new_tokens=2, limit=2))
"""


@pytest.fixture(scope="module")
def plans() -> dict[str, Any]:
    return {plan.name: plan for plan in load_config(CONFIG, "get_sweep")}


def test_every_table_is_there(plans: dict[str, Any]) -> None:
    assert list(plans) == TABLES
    assert [len(plan.tasks) for plan in plans.values()] == [8] * 3 + [6] * 3 + [4] * 3


def test_methods_have_equal_budgets(plans: dict[str, Any]) -> None:
    for plan in plans.values():
        config = preset(plan.base.model)
        counts = {name: count_params(config, a) for name, a in plan.methods.items()}
        assert len(counts) == 5
        assert all(abs(n / counts["lora"] - 1) < 0.025 for n in counts.values()), counts


def test_the_settings_are_llm_adapters_own(plans: dict[str, Any]) -> None:
    """By math_running_commands and finetune.py of its repository."""
    plan = plans["paper_math_7b"]
    lora, base = plan.methods["lora"], plan.base
    assert (lora.rank, lora.alpha, lora.dropout) == (32, 64.0, 0.05)
    assert lora.targets == "q|k|v|up|down"
    assert (base.data.batch_size, base.optim.warmup_steps, base.optim.schedule) == (
        16,
        100,
        "linear",
    )
    assert base.train.steps == 3 * 9919 // 16 and 3e-4 in plan.learning_rates
    assert base.data.train_on_prompt and base.data.prompt_style == "alpaca"
    assert (plan.scoring.num_beams, plan.scoring.prompt_style) == (4, "alpaca-eval")


TABLES = [f"paper_{g}_{s}" for g in ("commonsense", "math", "summary") for s in ("1b", "3b", "7b")]


@pytest.mark.parametrize("name", always(TABLES, lambda name: name == "paper_summary_7b"))
def test_the_plan_of_a_table(name: str, plans: dict[str, Any]) -> None:
    """What is stored of it; results/paper_plan.md has the compilers' totals."""
    plan = plans[name]
    changes = {"mesh.fsdp": 8}
    run = override(plan.base, changes)
    for adapter in plan.methods.values():
        stored = stored_bytes(override(run, {"adapter": adapter}), preset(run.model))
        assert sum(stored.values()) < 40 * 2**30, (name, adapter.method)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:head_dim 16")
@pytest.mark.parametrize("group", ["math", "commonsense"])
def test_a_table_on_a_tiny_model(
    group: str, plans: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All methods, from the files' names to the page, with few steps."""
    monkeypatch.setenv("ZFLORA_CACHE", str(tmp_path / "cache"))
    model = tiny_model(max_position_embeddings=2048)
    model.tokenizer = byte_tokenizer()
    save_hf(tmp_path / "model", model)
    plan = plans[f"paper_{group}_1b"]
    answers = [(f"What is {i} + 1?", f"{i + 1}") for i in range(60)]
    rows = [{"instruction": q, "input": "", "output": a, "answer": a} for q, a in answers]
    data = tmp_path / "DATA"
    files = {data / "llm_adapters" / "ft-training_set" / f"{plan.base.data.task}.json": rows}
    for name in plan.tasks:
        folder = TASKS[name].folder
        answer = "A" if name == "aqua" else "7"
        found = [
            row | {"instruction": f"{name} {i}?", "answer": answer}
            for i, row in enumerate(rows[:2])
        ]
        files[data / "llm_adapters" / "dataset" / folder / "test.json"] = found
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    small = ["train.steps=3", "optim.warmup_steps=0", "data.batch_size=2", "eval.limit=4"]
    small += ["data.bucket_lengths=[384]", "train.dtype=float32", "train.save_every=None"]
    config = tmp_path / "tiny.py"
    config.write_text(TINY.format(config=CONFIG, name=plan.name))
    where = ["--workdir", str(tmp_path / "w"), "--out", str(tmp_path / "out")]
    given = [f"model={tmp_path / 'model'}", f"data.data_dir={data}", *small]
    assert main(["sweep", "--config", str(config), *where, "--set", *given]) == 0
    page = (tmp_path / "out" / f"{plan.name}.md").read_text()
    assert all(name in page for name in (*plan.methods, *plan.tasks))
