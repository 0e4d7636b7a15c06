"""Runs that train in one program: each is equal to the run that trains by itself."""

import dataclasses
import json
import signal
import threading
import time

import jax
import numpy as np
import pytest
from support.checks import equations
from support.models import perturb, tiny_model
from support.sharded import batch, pairs, sharded_model

import zflora_jax as zf
from zflora_jax.config import AdapterConfig, MeshConfig, OptimConfig, RunConfig
from zflora_jax.core import trees
from zflora_jax.core.fields import override
from zflora_jax.experiments.grid import run_grid, sweep
from zflora_jax.parallel import distributed, sharding
from zflora_jax.reporting.metrics import read_metrics
from zflora_jax.training import group
from zflora_jax.training.objective import CrossEntropy, DirectPreference
from zflora_jax.training.trainer import TrainStep, init_state, make_steps
from zflora_jax.training.workdir import read_starts

OPTIM = OptimConfig(warmup_steps=2, eps=1e-3)
STEPS = {
    "dropout": (AdapterConfig("lora", rank=2, dropout=0.3), {"optim.loraplus_ratio": 4.0}),
    "full": (AdapterConfig("full"), {"optim.optimizer": "adafactor"}),
    "int8": (AdapterConfig("zflora-uniform", rank=4), {"optim.weight_decay": 0.1}),
    "mesh": (AdapterConfig("ffba", rank=4), {"optim.schedule": "linear"}),
    "pairs": (AdapterConfig("zflora-minimal", rank=4), {"optim.optimizer": "lion"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_three_runs_is_three_steps(name):
    """Runs of other seeds, rates, adapters, rows and numbers of finished steps."""
    adapter, settings = STEPS[name]
    model = sharded_model() if name == "mesh" else tiny_model()
    if name == "int8":
        model = zf.quantize_model(model, zf.QuantizeConfig("int8"))
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2) if name == "mesh" else MeshConfig())
    objective = DirectPreference(chunk=32) if name == "pairs" else CrossEntropy(32)
    params = sharding.shard(model.params, mesh)
    where, steps, states, batches = None, [], [], []
    for seed in range(3):
        optim = dataclasses.replace(OPTIM, learning_rate=1e-2 * (seed + 1))
        optim = override(RunConfig(optim=optim), settings).optim
        steps.append(TrainStep(model.config, adapter, optim, 10, objective, 2, 7 * seed))
        state = init_state(
            perturb(zf.init_adapters(jax.random.key(seed), model, adapter)), optim, 10
        )
        where = sharding.state_shardings(state, mesh)
        states.append(jax.device_put(state, where))
        rows = pairs() if name == "pairs" else batch()
        rows["tokens"] = (rows["tokens"] + seed) % 250
        batches.append(jax.device_put(rows, sharding.batch_sharding(mesh)))

    def make(at, states):
        return make_steps([steps[i] for i in at], where, params, states, [batches[i] for i in at])

    with jax.set_mesh(mesh):
        states[:1] = [made[0] for made in make([0], states[:1])]  # a step ahead of the others
        copies = jax.tree.map(lambda x: x.copy(), states)
        alone = [make([i], [states[i]])[0] for i in range(3)]
        alone = [make([i], [alone[i][0]])[0] for i in range(3)]
        together = make([0, 1, 2], [made[0] for made in make([0, 1, 2], copies)])
    for (state, metrics), (one, wanted) in zip(together, alone, strict=True):
        assert jax.tree.map(lambda x: x.sharding, state) == where
        assert metrics.keys() == wanted.keys() and int(state.step) == int(one.step)
        for key, value in wanted.items():
            np.testing.assert_allclose(metrics[key], value, rtol=2e-5, atol=1e-6, err_msg=key)
        for key, leaf in trees.flatten(one.adapters).items():
            found = trees.flatten(state.adapters)[key]
            np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-6, err_msg=key)
    for name in ("learning_rate", "loss"):
        assert len({float(metrics[name]) for _, metrics in together}) == 3


def test_a_base_kernel_is_in_one_product_for_all_runs():
    model, adapter = tiny_model(), AdapterConfig("lora", rank=2)
    step = TrainStep(model.config, adapter, OPTIM, 10, CrossEntropy(32))
    state = init_state(zf.init_adapters(jax.random.key(0), model, adapter), OPTIM, 10)

    def products(count):
        made = jax.make_jaxpr(lambda *args: make_steps([step] * count, None, *args))
        found = made(model.params, [state] * count, [batch()] * count)
        every = [x for x in equations(found.jaxpr) if x.primitive.name == "dot_general"]
        return [x for x in every if kernels & {y.aval.shape for y in x.invars}]

    layers = trees.flatten(model.params)
    kernels = {x.shape[1:] for name, x in layers.items() if name.endswith("kernel")}
    alone, together = products(1), products(3)
    assert len(alone) == len(together) > 10
    assert all(x.params["dimension_numbers"][1] == ((), ()) for x in together)  # none is batched


@pytest.fixture
def base(run: RunConfig) -> RunConfig:
    small = {"train.steps": 4, "train.save_every": 2, "train.log_every": 1}
    small |= {"data.train_limit": 12, "data.bucket_lengths": (320,), "optim.warmup_steps": 1}
    return override(run, small)


GRID = [
    {"train.seed": 0},
    {"train.seed": 1, "data.seed": 1},
    {"optim.learning_rate": 3e-3, "train.seed": 2},
    {"optim.learning_rate": 1e30},  # the last of them: others make the step that it leaves
    {"adapter.rank": 2},
]


def found_in(folder):
    """Run -> (adapters, losses, whether it is said to have trained with others), and its starts."""
    found = {}
    for path in sorted(folder.glob("*/report.json")):
        together = {start["together"] for start in read_starts(path.parent)}
        assert together == {json.loads(path.read_text())["together"]}
        losses = [record["loss"] for record in read_metrics(path.parent / "metrics.jsonl")]
        found[path.parent.name] = zf.load_run(path.parent)[2], losses, together
    return found


def test_a_sweep_of_one_program(base, tmp_path, monkeypatch):
    """On a mesh, on codes: one run diverges, one is of another program, and a signal stops all."""
    base = override(base, {"mesh.fsdp": 2, "quantize.kernels": "int8"})
    sizes, made = [], group.make_steps
    counted = lambda steps, *args: sizes.append(len(steps)) or made(steps, *args)  # noqa: E731
    monkeypatch.setattr(group, "make_steps", counted)
    rows = sweep(base, GRID, tmp_path / "one").to_dict("records")
    assert (tmp_path / "one" / "curves.png").is_file()
    whole = run_grid(base, GRID, tmp_path / "whole", console=False, together=4)
    assert sizes == [4, 4, 3, 3]  # the one that diverged is seen after a step more
    original = distributed.StopSignals.requested

    def signalled(self, step):
        if step == 3:
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # which the kernel may pick
            while not self.asked:  # by the main thread
                time.sleep(0.01)
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(distributed.StopSignals, "requested", signalled)
        with pytest.raises(zf.Preempted, match="saved"):
            run_grid(base, GRID, tmp_path / "cut", console=False, together=4)
    assert len(list(tmp_path.glob("cut/*/checkpoints/3"))) == 3
    cut = run_grid(base, GRID, tmp_path / "cut", console=False, together=4)
    said = ["finished"] * 3 + ["failed: loss is nan at step 2", "finished"]
    for found in (rows, whole, cut):
        assert [row["status"].partition(";")[0] for row in found] == said
    one, every, again = (found_in(tmp_path / name) for name in ("one", "whole", "cut"))
    assert len(one) == 4 and one.keys() == every.keys() == again.keys()
    for name, (adapters, losses, together) in every.items():
        assert together == ({1} if "rank" in name else {4})
        np.testing.assert_allclose(losses, one[name][1], rtol=1e-5)
        assert losses == again[name][1]
        for key, leaf in trees.flatten(adapters).items():
            np.testing.assert_allclose(leaf, trees.flatten(one[name][0])[key], atol=1e-6)
            np.testing.assert_array_equal(leaf, trees.flatten(again[name][0])[key])
