"""A fast subset of the faults in faults.py; `make soak` tries all of them many times."""

import pytest
from support.faults import FAULTS, Lab, lab_run, tries
from support.runs import small_run


@pytest.fixture(scope="session")
def lab(base_dir, tmp_path_factory):
    return Lab(lab_run(small_run(base_dir)), tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_survived(name, lab, tmp_path):
    (outcome,) = tries(lab, name, 1, tmp_path)
    assert outcome.survived and outcome.lost_steps == 0, outcome.message
