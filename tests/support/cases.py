"""The adapters that tests are parametrised over."""

from __future__ import annotations

import numpy as np
import pytest

from support.grids import always
from zflora_jax.adapters.methods import live_layers
from zflora_jax.config import METHODS, AdapterConfig, LlamaConfig
from zflora_jax.core import trees

LORA = AdapterConfig("lora", rank=4)
# Of today's variants of LoRA each one once; ranks and scales differ between kernels.
PATTERNS = {"rank_pattern": (("q|down", 4),), "alpha_pattern": (("v|up", 3.0),)}
DORA = AdapterConfig("lora", rank=6, alpha=9.0, use_dora=True, **PATTERNS)
UNIFORM = AdapterConfig("zflora-uniform", rank=6, alpha=9.0)
LAYERS = AdapterConfig("lora", rank=6, alpha=9.0, layers_to_transform=(1,), **PATTERNS)


def changes_with(method: str, targets: str) -> bool:
    """Whether targets "attention" or "mlp" leave a method something to change."""
    row = METHODS[method]
    own = {"attention": row.heads, "mlp": row.mlp}[targets]
    return method != "full" and (not row.widens or row.residual or own)


def adapter_cases() -> list[AdapterConfig]:
    """Every method, and the variants that take other paths through the code. alpha / rank is 1.5: a
    scale of 1 or a power of two would hide mistakes.
    """
    cases = [AdapterConfig(method, rank=6, alpha=9.0) for method in METHODS]
    cases += [
        AdapterConfig(m, rank=6, alpha=9.0, targets=t)
        for m in METHODS
        for t in ("attention", "mlp")
        if changes_with(m, t)
    ]
    cases += [
        AdapterConfig(m, rank=5, alpha=7.5, extra_head_dim=16, extra_mlp_units=7, head_scores=s)
        for m in ("zflora-uniform", "ffba")
        for s in (True, False)
    ]
    cases += [
        AdapterConfig("zflora-minimal", rank=6, alpha=9.0, targets="q|v|o|down"),
        AdapterConfig("zflora-minimal", rank=6, alpha=9.0, extra_mlp_units=7),
        AdapterConfig("ffba", rank=6, alpha=9.0, targets="q|k"),
        DORA,
        LAYERS,
    ]
    return cases


def dead_slices(
    config: LlamaConfig, adapter: AdapterConfig, adapters: trees.Tree
) -> list[np.ndarray]:
    """What `live_layers` leaves out of a tree of stacked adapters: one array for each dead layer of
    a block.
    """
    live = live_layers(config, adapter)
    found = []
    for name, leaf in trees.flatten(adapters).items():
        *_, kernel, block = name.split("/")
        alive = live[kernel][block] if kernel in live else range(config.num_layers)
        found += [np.asarray(leaf[i]) for i in range(config.num_layers) if i not in alive]
    return found


def case_id(adapter: AdapterConfig) -> str:
    parts = [
        adapter.method,
        adapter.targets.replace("|", ""),
        "" if adapter.head_scores else "values",
        str(adapter.extra_head_dim or adapter.extra_mlp_units or ""),
        "dora" if adapter.use_dora else "",
        "layers" if adapter.layers_to_transform else "",
    ]
    return "-".join(p for p in parts if p and p != "all")


CASES = adapter_cases()
BY_METHOD = [AdapterConfig(method, rank=6, alpha=9.0) for method in METHODS]
# Where every case is a long program to compile: every method, norms that DoRA reads, targets that
# split kernels, widened heads without scores. `make soak` has all cases.
VARIANTS = ("lora-dora", "zflora-minimal-qvodown", "zflora-uniform-values-16")
FEW = [*BY_METHOD, *(a for a in CASES if case_id(a) in VARIANTS)]
is_few = FEW.__contains__
every_method = pytest.mark.parametrize("adapter", BY_METHOD, ids=case_id)
few_cases = pytest.mark.parametrize("adapter", always(CASES, is_few), ids=case_id)
