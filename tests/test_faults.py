"""A fast subset of the faults in faults.py; `make soak` tries all of them many times."""

import pytest
from faults import FAULTS, Lab, tries

from zflora_jax.fields import override


@pytest.fixture(scope="session")
def lab(base_dir, tmp_path_factory):
    from conftest import small_run

    run = override(small_run(base_dir), {"train.steps": "24", "train.keep": "3", "mesh.data": "1"})
    return Lab(override(run, {"data.batch_size": "8", "data.accumulate": "1", "data.lengths": "[256]"}), tmp_path_factory.mktemp("lab"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_survived(name, lab, tmp_path):
    (outcome,) = tries(lab, name, 1, tmp_path)
    assert outcome.survived and outcome.lost_steps == 0, outcome.message
