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
        ("train.log_every", 3, True),
        ("train.max_to_keep", 5, True),
        ("mesh.data", 2, True),
        ("data.data_dir", "elsewhere", True),
        ("eval.limit", 7, False),
        ("train.steps", 101, False),
        ("train.seed", 1, False),
        ("train.remat", "block", True),
        ("data.grad_accum_steps", 2, True),
        ("adapter.rank", 8, False),
        ("data.packing", True, False),
    ],
)
def test_the_settings_that_decide_the_numbers(key, value, same):
    assert same_numbers(RUN, override(RUN, {key: value})) is same


def test_the_directory_of_own_files_decides_the_numbers(tmp_path):
    own = override(RUN, {"data.task": "rows", "data.data_dir": str(tmp_path / "a")})
    assert same_numbers(own, override(own, {"data.data_dir": f"{tmp_path}/./a"}))
    assert not same_numbers(own, override(own, {"data.data_dir": str(tmp_path / "b")}))


def test_a_start_left_to_the_method_is_its_own():
    lora = RunConfig(adapter=AdapterConfig("lora"))
    named = dataclasses.replace(lora, adapter=lora.adapter.explicit())
    assert same_numbers(lora, named)
    assert not same_numbers(lora, override(lora, {"adapter.init": "normal"}))


def test_with_dropout_the_number_of_micro_batches_decides():
    """What drops out is drawn for each of them."""
    drops = override(RUN, {"adapter.dropout": 0.1})
    assert same_numbers(drops, override(drops, {"train.loss_chunk": 64}))
    assert not same_numbers(drops, override(drops, {"data.grad_accum_steps": 2}))
