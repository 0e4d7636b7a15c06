"""`python fault_driver.py CONFIG.json WORKDIR FAULT.json`: a training run in which something goes
wrong at a chosen step. Exit codes are the CLI's.

Faults: {"stop_at": n} a stop is asked for after step n; {"poison": "loss" | "gradient" | "data",
"at": n} that is not a number in step n; {"crash_data_at": n} the data pipeline raises when it makes
the n-th batch; {"file_limit": n} no file can grow beyond n bytes; {} nothing.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import numpy as np


def main(config: str, workdir: str, fault: str) -> int:
    from zflora_jax.cli import main, train
    from zflora_jax.core import trees
    from zflora_jax.core.fields import from_dict
    from zflora_jax.core.run_config import RunConfig
    from zflora_jax.data import pipeline
    from zflora_jax.experiments import run
    from zflora_jax.parallel import distributed

    what: dict[str, Any] = json.loads(fault)
    if "file_limit" in what:
        resource.setrlimit(resource.RLIMIT_FSIZE, (what["file_limit"],) * 2)
    if "stop_at" in what:
        distributed.StopSignals.requested = lambda self, step: step == what["stop_at"]  # type: ignore[method-assign]
    if "poison" in what:
        make = run.make_train_step

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

        run.make_train_step = poisoned  # type: ignore[assignment]
    if "crash_data_at" in what:
        pad, made = pipeline.pad, [0]

        def crashing(*args: Any, **settings: Any) -> Any:
            made[0] += 1
            if made[0] >= what["crash_data_at"]:
                raise RuntimeError("the data pipeline broke")
            return pad(*args, **settings)

        pipeline.pad = crashing  # type: ignore[assignment]

    def faulty(_: Any) -> None:
        run.train(from_dict(RunConfig, json.loads(config)), workdir, console=False)

    train.run = faulty
    return main.main(["train", "--config", "-", "--workdir", workdir])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
