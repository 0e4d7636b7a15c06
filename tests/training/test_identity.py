"""Which settings make another run: what a sweep takes a record for."""

import dataclasses

import pytest

from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.training.identity import same_numbers

RUN = RunConfig(adapter=AdapterConfig("lora", rank=4))


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        *((f"train.{name}", 3, True) for name in ("log_every", "max_to_keep", "eval_every")),
        *((f"{key}", 2, True) for key in ("mesh.data", "data.grad_accum_steps")),
        ("data.data_dir", "elsewhere", True),
        ("train.remat", "block", True),
        ("train.loss_chunk", 64, True),
        *((f"train.{name}", 101, False) for name in ("steps", "seed")),
        ("eval.limit", 7, False),
        ("adapter.rank", 8, False),
        ("adapter.init", "normal", False),
        ("adapter.init", "kaiming_uniform", True),  # what None means
        ("data.packing", True, False),
    ],
)
def test_the_settings_that_decide_the_numbers(key, value, same):
    assert same_numbers(RUN, override(RUN, {key: value})) is same


def test_the_directory_of_own_files_decides_the_numbers(tmp_path):
    own = override(RUN, {"data.task": "rows", "data.data_dir": str(tmp_path / "a")})
    assert same_numbers(own, override(own, {"data.data_dir": f"{tmp_path}/./a"}))
    assert not same_numbers(own, override(own, {"data.data_dir": str(tmp_path / "b")}))


def test_with_dropout_the_number_of_micro_batches_decides():
    """What drops out is drawn for each of them."""
    drops = dataclasses.replace(RUN, adapter=RUN.adapter.replace(dropout=0.1))
    assert same_numbers(drops, override(drops, {"train.loss_chunk": 64}))
    assert not same_numbers(drops, override(drops, {"data.grad_accum_steps": 2}))
