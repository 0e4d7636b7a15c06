"""Can zflora-minimal gain? Its parts, changes of it and LoRA, judged by held-out losses.

  python -m studies.run minimal --set data.data_dir=DIR --workdir runs/minimal

DIR holds llm_adapters/. Fixed before the first run, with seeds that no earlier run had: all have
LoRA r=16's number of parameters within 2%, train for 80 steps of 512 tokens in float32 at the
better of two rates, and are compared with zflora-minimal by the loss on 400 test rows over six
seeds (Student's t). A change becomes the method's default if its loss is lower on both tasks, or if
it is simpler and on both a loss of more than 1% is excluded. Why these changes:
studies/experiments.md, "Inside trained adapters".
"""

from dataclasses import dataclass, replace

import zflora_jax as zf
from studies.configs.accuracy import BASE, CLOZE, LORA, MINIMAL
from studies.study import Study

READ_BY_MLP = "o|gate|up|down"  # no adapter of q, k and v: the MLP alone reads the state


@dataclass(frozen=True)
class LouderUnits(zf.Widening):
    """zflora-minimal whose MLP units write back 16 times as much."""

    def __post_init__(self) -> None:
        if self.inputs > self.outputs and len(self.inputs) == 1:  # down
            object.__setattr__(self, "scale", 16 * self.scale)


@dataclass(frozen=True)
class DownWrites(zf.Widening):
    """zflora-minimal whose state down alone writes."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {} if len(self.inputs) == 2 else super().shapes  # o


def get_studies() -> list[Study]:
    """The tables of results/minimal.md."""
    zf.add_method("louder-units", LouderUnits)
    zf.add_method("down-writes", DownWrites)
    methods = {
        "lora": LORA,
        "zflora-minimal": MINIMAL,
        "without-units": replace(MINIMAL, rank=27, extra_mlp_units=0),
        "without-qkv": replace(MINIMAL, rank=25, extra_mlp_units=20, targets=READ_BY_MLP),
        "without-both": replace(MINIMAL, rank=32, extra_mlp_units=0, targets=READ_BY_MLP),
        "lora-without-qkv": replace(LORA, rank=22, targets=READ_BY_MLP),
    }
    more = {
        "louder-units": replace(MINIMAL, method="louder-units"),
        "without-qk": replace(MINIMAL, rank=23, extra_mlp_units=23, targets=f"v|{READ_BY_MLP}"),
        "down-writes": replace(MINIMAL, method="down-writes", rank=23, extra_mlp_units=23),
    }
    train = replace(BASE.train, steps=80, dtype="float32")
    base = replace(BASE, train=train, eval=replace(BASE.eval, limit=400))
    data = replace(BASE.data, bucket_lengths=(64, 256), batch_size=2)
    tables = ("cloze", "+".join(CLOZE), methods | more), ("arithmetic", "arithmetic_steps", methods)
    return [
        Study(
            f"minimal_{name}",
            replace(base, data=replace(data, task=task)),
            contenders,
            learning_rates=(5e-4, 1.5e-3),
            seeds=tuple(range(10, 16)),
            reference="zflora-minimal",
            page="minimal",
        )
        for name, task, contenders in tables
    ]
