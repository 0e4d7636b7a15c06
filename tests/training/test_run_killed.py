"""A run that is killed goes on as if it had not been: a real kill, in a process of its own."""

from __future__ import annotations

import json

import jax
from support.checks import assert_trees_equal
from support.killed import kill_while_training
from support.runs import quiet_train, saved_state

from zflora_jax.core.fields import override
from zflora_jax.reporting.metrics import read_metrics


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(run, tmp_path):
    """kill -9 during training; then to the end, in another process. Parameters, optimizer state and
    every logged loss are those of one run. `make soak` kills fifty times.
    """
    run = override(run, {"train.steps": 24, "train.max_to_keep": 3, "eval.limit": 2})
    quiet_train(run, tmp_path / "whole")
    kill_while_training(run, tmp_path / "killed", after=5)
    quiet_train(run, tmp_path / "killed")
    resumed_from = json.loads((tmp_path / "killed" / "report.json").read_text())["resumed_from"]
    assert 2 <= resumed_from < 24
    starts = [
        json.loads(line) for line in (tmp_path / "killed" / "starts.jsonl").read_text().splitlines()
    ]
    assert (
        len(starts) == 2
        and starts[0]["step"] == 0
        and starts[1]["step"] == resumed_from
        and starts[1]["jax"] == jax.__version__
    )
    assert_trees_equal(*(saved_state(run, tmp_path / name) for name in ("killed", "whole")))
    losses = [
        [
            (r["step"], r["loss"])
            for r in read_metrics(tmp_path / w / "metrics.jsonl")
            if r["split"] == "train"
        ]
        for w in ("whole", "killed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 24
