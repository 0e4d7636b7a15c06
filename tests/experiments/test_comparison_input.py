"""Comparisons that could not be run as they are written."""

import pytest
from support.runs import EVAL

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.run_config import RunConfig
from zflora_jax.experiments.comparison import Comparison

LORA = {"lora": AdapterConfig("lora", rank=2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "lor"}, "comparison.reference: 'lor' is no method of it: did you mean"),
        ({"settings": {"x": {}}}, "comparison.settings: 'x' is no method of it"),
        ({"settings": {"lora": {"train.steps": 9}}}, r"has \['train.steps'\]: a method may have"),
        ({"settings": {"lora": {"optim.learning_rate": 1}}}, r"has \['optim.learning_rate'\]"),
        ({"contrasts": (("lora", "x"),), "reference": "lora"}, "contrasts: 'x' is no method of"),
        ({"contrasts": (("lora", "x"),)}, "contrasts needs comparison.reference, whose"),
        ({"contrasts": ("lora", "ffa")}, r"contrasts=.*: 'lora' is no pair of two methods. Give"),
        ({"contrasts": (("lora", "lora"),)}, r"\('lora', 'lora'\) is no pair of two methods"),
        ({"transfer": ("boolq",)}, r"transfer=\('boolq',\) needs comparison.tasks"),
        (
            {"tasks": ("boolq",), "scoring": EVAL, "transfer": ("boolq",)},
            r"transfer has \['boolq'\], which comparison.tasks has too",
        ),
        ({"measure": "acuracy"}, "comparison.measure='acuracy': did you mean 'accuracy'"),
        ({"margin": 2.0}, "margin=2.0: must be positive, and needs comparison.reference"),
    ],
)
def test_wrong_references(changes, message):
    with pytest.raises(ConfigError, match=message):
        Comparison("x", RunConfig(), LORA, (1e-3,), (0,), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": 1e-3}, r"comparison.learning_rates=0.001: expected a list of float"),
        ({"learning_rates": (1e-3, 1e-3)}, "learning_rates=.* has 0.001 twice: give each once"),
        ({"learning_rates": (1e-3, 1.0000001e-3)}, "has 0.001 twice"),  # their runs' names
        ({"seeds": 0}, r"comparison.seeds=0: expected a list of int, written as \[0\]"),
        ({"tasks": ("boolq", "boolq"), "scoring": EVAL}, "comparison.tasks=.* has boolq twice"),
        ({"margin": "3"}, "comparison.margin='3': expected float, got str"),
        (
            {"methods": {"lora": "lora"}},
            r"comparison.methods\['lora'\]='lora': expected a table of",
        ),
        ({"methods": ["lora"]}, r"comparison.methods=\['lora'\]: expected a table, {NAME: VALUE}"),
        ({"methods": {16: LORA["lora"]}}, "methods, key 16=16: expected str, got int"),
        ({"learning_rates": (float("nan"),)}, "learning_rates.*=nan: expected a finite number"),
        ({"more_seeds": [("lora", (1,))]}, "comparison.more_seeds=.*: expected a table"),
        (
            {"methods": {"a/b": LORA["lora"]}},
            "comparison.methods: 'a/b' is part of file names, so it must not be empty",
        ),
        ({"name": ""}, "comparison.name: '' is part of file names"),
        (
            {"reference": "lora", "contrasts": (("lora", "ffa"),) * 2},
            r"contrasts=.* has \('lora', 'ffa'\) twice",
        ),
    ],
)
def test_what_is_no_comparison_is_refused(changes, message):
    methods = LORA | {"ffa": AdapterConfig("ffa", rank=2)}
    given = {"name": "x", "methods": methods, "learning_rates": (1e-3,), "seeds": (0,)}
    with pytest.raises(ConfigError, match=message):
        Comparison(base=RunConfig(), **given | changes)


def test_one_task_needs_no_tuple():
    plan = Comparison("x", RunConfig(), LORA, [1e-3], range(2), tasks="boolq", scoring=EVAL)
    assert (plan.tasks, plan.learning_rates, plan.seeds) == (("boolq",), (1e-3,), (0, 1))
