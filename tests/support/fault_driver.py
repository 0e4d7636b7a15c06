"""`python fault_driver.py CONFIG.json WORKDIR FAULT.json`: a training run in which something goes
wrong at a chosen step. Exit codes are the CLI's.

Faults: {"stop_at": n} a stop is asked for after step n; {"poison": "loss" | "gradient" | "data",
"at": n} something that is not a number in step n; {"crash_data_at": n} the data pipeline raises
when it makes the n-th batch; {"file_limit": n} no file can grow beyond n bytes; {"signal_at": n}
two SIGTERM after step n; {} nothing.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

import numpy as np
import pytest


def main(config: str, workdir: str, fault: str, patch: pytest.MonkeyPatch) -> int:
    from zflora_jax.cli import main as cli, train
    from zflora_jax.core import trees
    from zflora_jax.core.fields import from_dict
    from zflora_jax.core.run_config import RunConfig
    from zflora_jax.data import pipeline
    from zflora_jax.experiments import train as whole_run
    from zflora_jax.parallel import distributed

    what: dict[str, Any] = json.loads(fault)
    if "file_limit" in what:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (what["file_limit"], hard))
    if "stop_at" in what:
        patch.setattr(
            distributed.StopSignals, "requested", lambda self, step: step == what["stop_at"]
        )
    if "signal_at" in what:
        requested = distributed.StopSignals.requested

        def signalled(self: distributed.StopSignals, step: int) -> bool:
            if step == what["signal_at"]:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
            return requested(self, step)

        patch.setattr(distributed.StopSignals, "requested", signalled)
    if "poison" in what:
        make = whole_run.step_of

        def poisoned(*args: Any, **settings: Any) -> Any:
            step = make(*args, **settings)

            def one(params: Any, state: Any, batch: Any) -> Any:
                if int(state.step) + 1 == what["at"]:
                    if what["poison"] == "loss":
                        params = trees.map_with_names(
                            lambda name, x: (
                                x * np.float32("nan") if name == "final_norm/scale" else x
                            ),
                            params,
                        )
                    elif what["poison"] == "data":  # a token that no embedding has reads as NaN
                        batch = batch | {"tokens": batch["tokens"] + np.int32(100000)}
                    # The loss is finite, its gradient is not, and the update has spoilt the
                    # adapters
                    else:
                        state, metrics = step(params, state, batch)
                        spoilt = trees.map_with_names(
                            lambda _, x: x * np.float32("nan"), state.adapters
                        )
                        return state.replace(adapters=spoilt), metrics | {
                            "grad_norm": metrics["grad_norm"] * np.float32("inf")
                        }
                return step(params, state, batch)

            return one

        patch.setattr(whole_run, "step_of", poisoned)
    if "crash_data_at" in what:
        pad, made = pipeline.pad, [0]

        def crashing(*args: Any, **settings: Any) -> Any:
            made[0] += 1
            if made[0] >= what["crash_data_at"]:
                raise RuntimeError("the data pipeline broke")
            return pad(*args, **settings)

        patch.setattr(pipeline, "pad", crashing)

    def faulty(_: Any) -> None:
        whole_run.train(from_dict(RunConfig, json.loads(config)), workdir, console=False)

    patch.setattr(train, "run", faulty)
    return cli.main(["train", "--config", "-", "--workdir", workdir])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:], pytest.MonkeyPatch()))
