"""Which settings make another run: what a sweep takes a record for."""

import pytest

from zflora_jax import AdapterConfig, ConfigError, RunConfig, override
from zflora_jax.parallel import distributed
from zflora_jax.training.identity import require_same_settings, same_numbers

RUN = RunConfig(adapter=AdapterConfig("lora", rank=4))
OWN = {"data.task": "rows", "data.data_dir": "here/a"}
DROPS = {"adapter.dropout": 0.1}


@pytest.mark.parametrize(
    ("there", "key", "value", "same"),
    [
        *(({}, f"train.{name}", 3, True) for name in ("log_every", "max_to_keep", "eval_every")),
        *(({}, key, 2, True) for key in ("mesh.data", "data.grad_accum_steps")),
        ({}, "train.remat", "block", True),
        ({}, "train.scan_layers", False, True),
        *(({}, x, 101, False) for x in ("train.steps", "train.seed", "data.seed", "eval.limit")),
        ({}, "adapter.rank", 8, False),
        ({}, "adapter.init", "normal", False),
        ({}, "adapter.init", "kaiming_uniform", True),  # what None means
        ({}, "data.data_dir", "elsewhere", True),
        *((OWN, "data.data_dir", f"here/{x}", x != "b") for x in ("./a", "b")),
        (DROPS, "train.loss_chunk", 64, True),
        (DROPS, "data.grad_accum_steps", 2, False),  # inputs drop out for each micro-batch
        (DROPS, "train.scan_layers", False, False),
    ],
)
def test_the_settings_that_decide_the_numbers(there, key, value, same):
    run = override(RUN, there)
    assert same_numbers(run, override(run, {key: value})) is same


def test_processes_may_find_one_model_at_two_paths(monkeypatch):
    gathered = []
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        distributed, "gather_bytes", lambda own: (gathered.append(own), gathered)[1]
    )
    require_same_settings(override(RUN, {"model": "a", "data.data_dir": "a"}))
    require_same_settings(override(RUN, {"model": "b", "data.data_dir": "b"}))
    with pytest.raises(ConfigError, match=r"train\.seed: 0 in process 0, 1; 7 in process 2"):
        require_same_settings(override(RUN, {"train.seed": 7}))
