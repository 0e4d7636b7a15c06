"""The definitions of studies: public names alone, equal budgets, wrong fields."""

import ast
import re

import pytest
from support.paths import ROOT

import zflora_jax as zf
from studies.study import Study, studies

BASE = zf.RunConfig()
LORA = {"lora": zf.AdapterConfig("lora")}


@pytest.fixture(scope="module")
def known() -> dict[str, Study]:
    return {study.name: study for study in studies()}


def test_studies_use_public_names_alone():
    """And the package does not know of them."""
    for path in (ROOT / "studies").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.startswith("zflora_jax.")], path
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "zf":
                assert node.attr in zf.__all__, f"{path}: zf.{node.attr}"
    for path in (ROOT / "zflora_jax").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) studies", path.read_text(), re.MULTILINE), path


def test_methods_have_the_same_number_of_parameters(known):
    """Within 3.3% of LoRA's, 5% at rank 4; SmolLM2's ffa has half, and full has them all."""
    budgets = {"accuracy_rank4": 1_221_120, "accuracy_rank64": 19_537_920}
    for name, study in known.items():
        if "scales" in study.methods:
            continue
        config, small = zf.preset(study.base.model), study.base.model == "smollm2-135m"
        own = 4_884_480 if small else zf.count_params(config, study.methods["lora"])
        within = 0.05 if name == "accuracy_rank4" else 0.033
        for label, adapter in study.methods.items():
            share = zf.count_params(config, adapter) / budgets.get(name, own)
            assert (small and label in ("ffa", "full")) or abs(share - 1) < within, (name, label)


def test_runs_differ_by_method_rate_seed_and_length():
    methods = LORA | {"plus": zf.AdapterConfig("lora")}
    fields = {"settings": {"plus": {"optim.loraplus_ratio": 4.0}}, "more_seeds": {"plus": (2,)}}
    study = Study("s", BASE, methods, (1e-3,), (0,), 20, rates={"plus": (1e-4, 1e-3)}, **fields)
    assert list(study.rate_runs("plus")) == [1e-4, 1e-3]
    [short] = study.rate_runs("lora").values()
    assert (short.name, short.settings.train.steps) == ("lora-lr0.001-steps20-seed0", 20)
    runs = study.seed_runs("plus", 1e-3)
    assert [run.name for run in runs.values()] == ["plus-lr0.001-seed0", "plus-lr0.001-seed2"]
    settings = runs[2].settings
    assert settings.train.seed == settings.data.seed == 2 and settings.eval.split == "validation"
    assert settings.optim.loraplus_ratio == 4.0 and short.settings.optim.loraplus_ratio == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": {"base": LORA["lora"]}}, "'base' is the untrained model's label"),
        ({"tasks": ("boolq",)}, "tasks and scoring go together"),
        ({"more_seeds": {"dora": (1,)}}, r"\['dora'\] are no labels of its methods \['lora'\]"),
        ({"rates": {"dora": (1.0,)}}, r"\['dora'\] are no labels of its methods"),
        ({"more_seeds": {"lora": (0,)}}, "give each seed once"),
        ({"seeds": ()}, "give each seed once, and at least one"),
        ({"settings": {"lora": {"train.steps": 3}}}, "may change optim"),
        ({"settings": {"lora": {"optim.learning_rate": 1.0}}}, "except the learning rate"),
        ({"margin": 3.0}, "margin and contrasts need a reference"),
    ],
)
def test_wrong_studies(fields, message):
    given = {"methods": LORA, "learning_rates": (1e-3,), "seeds": (0,)} | fields
    with pytest.raises(zf.ConfigError, match=message):
        Study("x", BASE, **given)
