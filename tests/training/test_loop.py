"""The loop calls its hooks in one order, with numbers one step late and the state where it is asked
for.
"""

import jax.numpy as jnp
import numpy as np

from zflora_jax.training.loop import Hook, fit
from zflora_jax.training.trainer import TrainState


class Recorder(Hook):
    def __init__(self, name, calls, every=None, stop_at=None):
        self.name, self.calls, self.every, self.stop_at = name, calls, every, stop_at

    def on_batch(self, step, batch):
        self.calls.append((self.name, "batch", step, int(batch["tokens"][0])))

    def on_metrics(self, step, metrics, seconds):
        assert seconds > 0
        self.calls.append((self.name, "metrics", step, metrics["loss"]))

    def is_due(self, step, stopping):
        return self.every is not None and (stopping or step % self.every == 0)

    def on_state(self, step, state, results):
        self.calls.append((self.name, "state", step, int(state.step), dict(results)))
        results[self.name] = step

    def should_stop(self, step):
        return step == self.stop_at


def run(steps, *hooks, first=0):
    def step_fn(params, state, batch):
        return state.replace(step=state.step + 1), {"loss": params * batch["tokens"][0]}

    state = TrainState(jnp.int32(first), {}, ())
    batches = ({"tokens": np.asarray([10 * n])} for n in range(first + 1, 100))
    placed = lambda batch: {name: jnp.asarray(x) for name, x in batch.items()}  # noqa: E731
    return int(fit(step_fn, jnp.int32(2), state, batches, steps, hooks, placed).step)


def test_hooks_are_called_in_order_with_metrics_one_step_late():
    """The state comes after its metrics, and results go from hook to hook."""
    calls = []
    assert run(3, Recorder("a", calls)) == 3
    assert [call[1:3] for call in calls] == [
        *(("batch", 1), ("batch", 2), ("metrics", 1)),
        *(("batch", 3), ("metrics", 2), ("metrics", 3)),
    ]
    calls.clear()
    run(4, Recorder("a", calls, every=4), Recorder("b", calls, every=2), Recorder("c", calls))
    shown = [call for call in calls if call[1] == "state" or call[1:3] == ("metrics", 2)]
    assert shown == [
        *((name, "metrics", 2, 40.0) for name in "abc"),
        ("b", "state", 2, 2, {}),
        ("a", "state", 4, 4, {}),
        ("b", "state", 4, 4, {"a": 4}),
    ]


def test_a_stop_ends_training_with_the_state_for_who_wants_it():
    calls = []
    assert run(8, Recorder("a", calls, every=5, stop_at=3), Recorder("b", calls)) == 3
    metrics = [(name, "metrics", 3, 60.0) for name in "ab"]
    assert calls[-3:] == [*metrics, ("a", "state", 3, 3, {})]
    calls.clear()
    assert run(8, Recorder("a", calls, stop_at=3), first=1) == 3
    assert calls[-1] == ("a", "metrics", 3, 60.0)
    assert run(3, Recorder("a", calls), first=3) == 3  # finished
