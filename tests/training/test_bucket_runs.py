"""Runs whose workdir is in a bucket: the numbers and files of a run on disk, kills at the worst
places, one writer at a time. The store is an S3 server on loopback.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.compiler import get_compile_options
from support.bucket import names
from support.checks import assert_trees_equal
from support.paths import TESTS
from support.runs import quiet_train, saved_state

from zflora_jax.core.fields import override
from zflora_jax.core.run_config import RunConfig
from zflora_jax.core.storage import as_path
from zflora_jax.experiments.run_report import read_report
from zflora_jax.parallel import distributed
from zflora_jax.parallel.compile_cache import compile_cache
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training.workdir import read_starts, saved_steps

TIMES = ("target_tokens_per_s", "data_wait_share")  # of a record
PATIENCE = 240  # seconds that any one process may take


@pytest.fixture
def url(bucket: str) -> str:
    return f"{bucket}/runs/a"


@pytest.fixture(scope="module")
def whole(base_dir, tmp_path_factory) -> Path:
    """The run on disk, never stopped."""
    from support.runs import small_run

    workdir = tmp_path_factory.mktemp("whole") / "a"
    quiet_train(small_run(base_dir), workdir)
    return workdir


def records(workdir: Any) -> list[dict[str, Any]]:
    found = read_metrics(as_path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMES} for record in found]


def same_outcome(run: RunConfig, workdir: Any, whole: Path) -> None:
    """Parameters, optimizer state, records and results are those of the run on disk."""
    assert_trees_equal(saved_state(run, workdir), saved_state(run, whole))
    assert records(workdir) == records(whole)
    reports = []
    for report in map(read_report, (workdir, whole)):
        assert report is not None
        timed = {"environment", "resumed_from", "data_wait_share"}
        reports.append({k: v for k, v in report.items() if k not in timed and "seconds" not in k})
    assert reports[0] == reports[1]


def start(run: RunConfig, url: str, point: dict[str, Any]) -> subprocess.Popen[str]:
    """`run` in a process of its own, with the programs that this one has compiled."""
    tests = TESTS
    env = os.environ | {
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    words = [json.dumps(dataclasses.asdict(run)), url, json.dumps(point)]
    return subprocess.Popen(
        [sys.executable, str(tests / "support" / "kill_at.py"), *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killed_at(run: RunConfig, url: str, point: dict[str, Any]) -> None:
    process = start(run, url, point)
    try:
        output = process.communicate(timeout=PATIENCE)[0]
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, output[-2000:]


# --- the numbers and files of a run on disk -------------------------------------------------------


@pytest.mark.soak
def test_a_run_in_a_bucket_is_the_run_on_disk(run, each_bucket, whole):
    """In both kinds of store. Its twin is the run that is killed once, below."""
    url = f"{each_bucket}/runs/a"
    quiet_train(run, url)
    same_outcome(run, url, whole)
    assert saved_steps(url) == saved_steps(whole)


def test_programs_are_kept_in_the_bucket(own_programs, hits, url):
    kept = []
    for _ in range(2):
        with compile_cache(f"{url}/compile_cache"):
            jax.clear_caches()
            assert jax.jit(lambda x: x * 3 + 1)(2) == 7
        kept.append([name for name in names(url) if name.endswith("-cache")])
    assert kept[0] and kept[0] == kept[1] and len(hits) == len(kept[0])


def test_xla_is_given_no_url(own_programs, tmp_path, url):
    """Of GPUs it keeps measurements in the cache's directory, and can open no bucket."""
    before, found = jax.config.jax_persistent_cache_enable_xla_caches, []
    for place in (tmp_path, f"{url}/compile_cache"):
        with compile_cache(place):
            options = get_compile_options(num_replicas=1, num_partitions=1)
        build = options.executable_build_options.debug_options
        found.append(build.xla_gpu_per_fusion_autotune_cache_dir)
    assert found == [str(tmp_path / "xla_gpu_per_fusion_autotune_cache_dir"), ""]
    assert jax.config.jax_persistent_cache_enable_xla_caches == before


# --- kills ----------------------------------------------------------------------------------------

POINTS = [
    {"object": "4/commit.json", "nth": 1, "when": "before"},  # data without its marker
    {"object": "4/commit.json", "nth": 1, "when": "after"},  # before older ones are removed
    {"object": "metrics.jsonl", "nth": 3, "when": "before"},
    {"object": "metrics.jsonl", "nth": 3, "when": "after"},  # records of a state not saved
    {"object": "config.json", "nth": 1, "when": "after"},
    {"object": "report.json", "nth": 1, "when": "before"},
]


def test_a_kill_between_data_and_marker(run, url, whole):
    killed_at(run, url, POINTS[0])
    assert saved_steps(url) == [2]
    assert any("checkpoints/4/state" in name for name in names(url))
    assert max(r["step"] for r in records(url)) >= 4  # uploaded before the state
    quiet_train(run, url)
    assert [line["step"] for line in read_starts(url)] == [0, 2]
    same_outcome(run, url, whole)
    assert saved_steps(url) == saved_steps(whole)
    there = {name.removeprefix("runs/a/").partition("/")[0] for name in names(url)}
    files = {"config.json", "metrics.jsonl", "starts.jsonl", "report.json", "tensorboard"}
    assert there == files | {"checkpoints"}
    before = read_report(url)
    assert quiet_train(run, url).report == before  # finished: nothing is trained again


@pytest.mark.soak
@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p['when']} {p['object']}")
def test_kills_at_the_worst_places(run, url, whole, point):
    killed_at(run, url, point)
    quiet_train(run, url)
    same_outcome(run, url, whole)


@pytest.mark.soak
def test_twenty_random_kills_of_one_run(run, url, tmp_path):
    """One in four while the process starts, the others up to a second after it has saved a step."""
    run = override(run, {"train.steps": 600, "train.save_every": 3, "train.max_to_keep": 2})
    draw, saved = random.Random(18), [0]
    for number in range(20):
        process = start(run, url, {})
        try:
            if number % 4 == 0:
                time.sleep(draw.uniform(1.0, 8.0))
            else:
                deadline = time.monotonic() + PATIENCE
                while max(saved_steps(url), default=0) == saved[-1] and process.poll() is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                time.sleep(draw.uniform(0.0, 1.0))
            ended = process.poll()
        finally:
            process.kill()
            output = process.communicate()[0]
        assert ended is None, output[-2000:]
        saved.append(max(saved_steps(url), default=0))
        print(f"kill {number + 1}: step {saved[-1]} of {run.train.steps} is saved", flush=True)
    quiet_train(run, url)
    quiet_train(run, tmp_path / "whole")
    assert len(set(saved)) > 12  # it came on between the kills
    same_outcome(run, url, tmp_path / "whole")


# --- several processes ----------------------------------------------------------------------------


def test_processes_find_each_other_in_a_bucket(url):
    file = as_path(url) / ".shared-1"
    assert not distributed._appears(file, 0.0)
    distributed._write_nonce(file)
    assert distributed._appears(file, 0.0)


@pytest.mark.soak
def test_two_processes_train_in_a_bucket(run, url, tmp_path):
    """The numbers of one process on disk; then one process goes on with what two have saved."""
    from parallel.test_hosts import finish, launch

    four = override(run, {"mesh.data": 2, "mesh.fsdp": 2, "data.grad_accum_steps": 1})
    quiet_train(four, tmp_path / "one")
    finish(launch(four, tmp_path / "two", 2, 2, given=url))
    report = read_report(url)
    assert report is not None and report["processes"] == 2
    numbers = [
        [(r["loss"], r["tokens"]) for r in records(workdir)] for workdir in (url, tmp_path / "one")
    ]
    np.testing.assert_allclose(*numbers, rtol=2e-5)
    states = [saved_state(four, workdir) for workdir in (url, tmp_path / "one")]
    for name, leaf in states[1].items():
        np.testing.assert_allclose(states[0][name], leaf, atol=2e-4, err_msg=name)
    quiet_train(override(four, {"train.steps": 10}), url)
    assert saved_steps(url)[-1] == 10
