"""Faults in a run, tried within the test's process; `make soak` tries them and others with
processes of their own, many times. A real kill: test_run_killed.py.
"""

import signal

import pytest
from support.faults import LOCAL, tries
from support.lab import LocalLab, lab_run
from support.runs import small_run

from zflora_jax.core.fields import override


@pytest.fixture(scope="module")
def lab(base_dir, tmp_path_factory):
    run = override(lab_run(small_run(base_dir)), {"train.steps": 12, "data.batch_size": 4})
    return LocalLab(run, tmp_path_factory.mktemp("lab"))


# A full disk ends coroutines of orbax, which complain of it when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", LOCAL)
def test_faults_are_survived(name, lab, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    for attempt in tries(lab, name, *LOCAL[name], tmp_path):
        outcome = attempt()
        assert outcome.survived and outcome.lost_steps == 0, outcome.message
    assert signal.getsignal(signal.SIGTERM) == handler, "left to the tests after this one"
