"""Several tasks on one base: padded adapters compute the same, swaps leave the base's bits and
compile nothing, mixed batches equal one by one.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from support.checks import assert_logits_close, assert_trees_equal, compiled
from support.grids import always, pairwise
from support.models import perturb, untied

from zflora_jax.adapters import fuse as fusing
from zflora_jax.adapters.fuse import fuse, swap, unfuse
from zflora_jax.adapters.init import init_adapters
from zflora_jax.adapters.methods import base_config
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.adapters.tasks import pad_adapters, rows_of, stack_tasks
from zflora_jax.core import trees
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import ConfigError
from zflora_jax.core.model import Model
from zflora_jax.inference import decode, program
from zflora_jax.inference.decode import generate_tokens
from zflora_jax.inference.generation_config import Sampler
from zflora_jax.inference.serving import serve
from zflora_jax.nn.llama import forward

MINIMAL = AdapterConfig("zflora-minimal", rank=6, alpha=9.0)
PROMPTS = [[1, 2, 3], [9, 8, 7, 6, 5, 4], [100], [4, 4, 8, 1]]


@pytest.fixture(scope="module")
def base() -> Model:
    return untied()


def adapters_of(model: Model, adapter: AdapterConfig, seed: int) -> trees.Tree:
    return perturb(init_adapters(jax.random.key(seed), model, adapter), seed=seed)


# --- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("small", "wide"),
    always(
        [
            (MINIMAL, AdapterConfig("zflora-minimal", rank=10, alpha=10.0)),
            (MINIMAL, AdapterConfig("zflora-minimal", rank=6, extra_mlp_units=9, alpha=9.0)),
            (AdapterConfig("zflora-minimal", rank=4, targets="attention"), MINIMAL),
            (MINIMAL, AdapterConfig("zflora-uniform", rank=8, extra_head_dim=16, alpha=3.0)),
            (
                AdapterConfig("zflora-uniform", rank=4, extra_head_dim=16),
                AdapterConfig("zflora-uniform", rank=8, extra_head_dim=48),
            ),
            (
                AdapterConfig("ffba", rank=4, extra_head_dim=16),
                AdapterConfig("ffba", rank=8, extra_head_dim=48),
            ),
            (AdapterConfig("lora", rank=4, alpha=6.0), AdapterConfig("lora", rank=9, alpha=27.0)),
            (AdapterConfig("lora", rank=4, targets="q|v"), AdapterConfig("lora", rank=4)),
        ],
        lambda pair: pair[0].method == "zflora-uniform" or pair[1].method == "zflora-uniform",
    ),
    ids=lambda a: f"{a.method}-{a.rank}-{a.targets.replace('|', '')}",
)
def test_padded_adapters_compute_the_same(base, small, wide, tokens):
    adapters = adapters_of(base, small, 3)
    want = forward(base, tokens, small, adapters)
    assert not np.allclose(want, forward(base, tokens), atol=1e-2)
    padded, layers = pad_adapters(base.config, small, adapters, wide), base.config.num_layers
    apart = pad_adapters(base.config, small, trees.unstack_layers(adapters, layers), wide)
    assert "layers" in padded and "layers" not in apart
    assert_trees_equal(trees.stack_layers(apart, layers), padded)
    assert_logits_close(forward(base, tokens, wide, padded), want)
    assert_logits_close(forward(fuse(base, wide, padded), tokens), want)


@pytest.mark.parametrize(
    ("given", "to", "message"),
    [
        (MINIMAL, AdapterConfig("zflora-minimal", rank=4), "wider than the latter"),
        (
            MINIMAL,
            AdapterConfig("zflora-minimal", rank=6, targets="attention"),
            "the latter has no",
        ),
        (MINIMAL, AdapterConfig("lora", rank=8), "the latter has no backward of down"),
        (
            AdapterConfig("ffa", rank=4),
            AdapterConfig("ffa", rank=8),
            "method 'ffa' cannot be padded",
        ),
        (MINIMAL, AdapterConfig("full"), "method 'full' cannot be padded"),
        (
            AdapterConfig("lora", rank=4),
            AdapterConfig("lora", rank=4, layers_to_transform=(0,)),
            "the latter has lora_a of q, .* in fewer layers",
        ),
    ],
    ids=["narrower", "targets", "method", "ffa", "full", "fewer layers"],
)
def test_what_cannot_be_padded_is_refused(base, given, to, message):
    with pytest.raises(ConfigError, match=message):
        pad_adapters(base.config, given, adapters_of(base, given, 3), to)


def test_padding_checks_the_adapters(base):
    with pytest.raises(ValueError, match="missing"):
        pad_adapters(base.config, MINIMAL, {}, MINIMAL)


# --- swaps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_hundred_swaps_compile_once_and_leave_the_base(base, packed):
    """Of tasks of two ranks, the smaller one padded."""
    small = AdapterConfig("zflora-minimal", rank=4)
    tasks = [
        adapters_of(base, MINIMAL, 1),
        pad_adapters(base.config, small, adapters_of(base, small, 2), MINIMAL),
    ]
    want = [generate_tokens(fuse(base, MINIMAL, task), PROMPTS, max_new_tokens=8) for task in tasks]
    assert want[0] != want[1]
    fused = fuse(base, MINIMAL, tasks[0])
    first = pack_for_decode(fused) if packed else fused
    kept = jax.tree.map(np.asarray, first.params)
    live = swap(first, tasks[1])
    assert generate_tokens(live, PROMPTS, max_new_tokens=8) == want[1]
    compiled = fusing._swap._cache_size()
    for turn in range(101):
        live = swap(live, tasks[turn % 2])
    assert fusing._swap._cache_size() == compiled
    assert_trees_equal(live.params, kept)  # the last was task 0
    assert generate_tokens(live, PROMPTS, max_new_tokens=8) == want[0]
    if not packed:
        assert_trees_equal(unfuse(live)[0].params, base.params)


# --- mixed batches --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapter",
    [MINIMAL, AdapterConfig("zflora-uniform", rank=6, alpha=9.0), AdapterConfig("lora", rank=5)],
    ids=lambda a: a.method,
)
def test_a_mixed_batch_equals_one_by_one(base, adapter, tokens):
    tasks = [adapters_of(base, adapter, seed) for seed in (1, 2, 3)]
    stacked, order = stack_tasks(tasks), [2, 0, 1]
    valid = np.arange(tokens.shape[1])[None] >= np.asarray([0, 3, 5])[:, None]  # left padding
    mixed = forward(base, tokens, adapter, row_adapters=rows_of(stacked, order), padding_mask=valid)
    for row, task in enumerate(order):
        alone = forward(base, tokens[row : row + 1], adapter, tasks[task], valid[row : row + 1])
        assert_logits_close(
            mixed[row : row + 1, valid[row].argmax() :], alone[:, valid[row].argmax() :]
        )


@pytest.mark.parametrize("rows", [1, 2])
def test_adapters_of_more_rows_than_there_are_tokens_are_refused(base, tokens, rows):
    stacked = stack_tasks([adapters_of(base, MINIMAL, seed) for seed in (1, 2)])
    with pytest.raises(
        ConfigError, match=f"row_adapters of 3 rows and tokens of {rows}: give one for each row"
    ):
        forward(base, tokens[:rows], MINIMAL, row_adapters=rows_of(stacked, [0, 1, 1]))


@pytest.mark.parametrize(
    ("sampler", "batch_size"),
    always(
        list(itertools.product([None, Sampler(0.8)], [1, 2, 3, 16])),
        lambda case: case in [(None, 1), (Sampler(0.8), 3)],
    ),
    ids=str,
)
def test_mixed_generation_equals_one_by_one(base, batch_size, sampler):
    tasks = [adapters_of(base, MINIMAL, seed) for seed in (1, 2)]
    order, settings = (
        [1, 0, 0, 1],
        {
            "max_new_tokens": 9,
            "sampler": sampler,
            "seed": 5,
            "adapter": MINIMAL,
        },
    )
    mixed = generate_tokens(
        base, PROMPTS, adapters=stack_tasks(tasks), tasks=order, batch_size=batch_size, **settings
    )
    alone = [
        generate_tokens(base, PROMPTS, adapters=tasks[task], **settings)[row]
        for row, task in enumerate(order)
    ]
    other = [
        generate_tokens(base, PROMPTS, adapters=tasks[1 - task], **settings)[row]
        for row, task in enumerate(order)
    ]
    assert mixed == alone and all(a != b for a, b in zip(alone, other, strict=True))


def test_wrong_tasks_are_refused(base):
    adapters = adapters_of(base, MINIMAL, 1)
    stacked = stack_tasks([adapters, adapters])
    for settings, message in (
        ({"tasks": [0]}, "4 prompts and 1 tasks"),
        ({"tasks": [0, 1, 2, 0]}, "there are 2, from 0"),
        ({"tasks": [0, 1, -1, 0]}, "there are 2, from 0"),
        ({"tasks": [0, 1, 1, 0], "num_beams": 2}, "does not mix tasks"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate_tokens(
                base, PROMPTS, max_new_tokens=2, adapter=MINIMAL, adapters=stacked, **settings
            )
    with pytest.raises(ConfigError, match="give adapter and adapters too"):
        generate_tokens(base, PROMPTS, max_new_tokens=2, tasks=[0] * 4)
    with pytest.raises(ConfigError, match="bring them to one width"):
        stack_tasks([adapters, adapters_of(base, MINIMAL.replace(rank=4), 1)])
    with pytest.raises(ValueError, match="Tasks 1 and 0 have different parameters"):
        stack_tasks([adapters, adapters_of(base, AdapterConfig("lora", rank=6), 1)])


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("method", "packed"), pairwise(["ffba", "zflora-minimal", "zflora-uniform"], [True, False])
)
def test_a_swap_copies_no_kernel(base, method, packed):
    """What it allocates beside the donated buffers is less than one layer's smallest kernel."""
    adapter = AdapterConfig(method, rank=4)
    adapters = adapters_of(base, adapter, 1)
    model = fuse(base, adapter, adapters)
    model = pack_for_decode(model) if packed else model
    narrow = base_config(model.config.replace(packed=False), adapter)
    lowered = fusing._swap.lower(model.config, narrow, adapter, model.params, adapters)
    memory = compiled(lowered).memory_analysis()
    kernels = [
        leaf.nbytes for name, leaf in trees.flatten(model.params).items() if name.endswith("kernel")
    ]
    assert memory.alias_size_in_bytes >= sum(kernels)
    assert memory.temp_size_in_bytes < min(kernels) / (1 if packed else base.config.num_layers)


# --- a server's loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 64])
def test_requests_are_grouped_by_task_and_answered_as_alone(base, window, monkeypatch):
    tasks = {"math": adapters_of(base, MINIMAL, 1), "chat": adapters_of(base, MINIMAL, 2)}
    names = ["math", "chat", "math", "math", "chat", "math"]
    requests = [(name, PROMPTS[i % 4]) for i, name in enumerate(names)]
    alone = {
        name: generate_tokens(
            fuse(base, MINIMAL, tree), [prompt for _, prompt in requests], max_new_tokens=7
        )
        for name, tree in tasks.items()
    }
    swaps: list[int] = []
    monkeypatch.setattr(
        "zflora_jax.inference.serving.swap",
        lambda model, tree: (swaps.append(1), swap(model, tree))[1],
    )
    answers = list(
        serve(
            fuse(base, MINIMAL, tasks["chat"]),
            tasks,
            iter(requests),
            max_new_tokens=7,
            window=window,
        )
    )
    assert sorted(number for number, _ in answers) == list(range(6))
    for number, answer in answers:
        assert answer == alone[names[number]][number]
    # One after the other, the last two of a window together, all of a task together.
    assert len(swaps) == {1: 5, 3: 3, 64: 2}[window]
    assert answers[0][0] == 0  # the oldest first


def test_groups_of_any_size_share_few_programs(base):
    tree, before = adapters_of(base, MINIMAL, 1), program.DecodeProgram.decode._cache_size()
    fused = fuse(base, MINIMAL, tree)
    for n in range(1, 9):
        answers = dict(serve(fused, {"math": tree}, [("math", PROMPTS[0])] * n, max_new_tokens=3))
        assert list(answers) == [*range(n)] and len(set(map(tuple, answers.values()))) == 1
    assert program.DecodeProgram.decode._cache_size() - before <= 4  # of 1, 2, 4 and 8 rows


def test_an_answer_waits_for_its_batch_alone(base, monkeypatch):
    ended: list[int] = []
    run = decode.gathered
    monkeypatch.setattr(decode, "gathered", lambda x: (ended.append(1), run(x))[1])
    tree, seen = adapters_of(base, MINIMAL, 1), []
    requests = [("math", [1, 2 + i]) for i in range(5)]
    for _ in serve(fuse(base, MINIMAL, tree), {"math": tree}, requests, batch_size=2):
        seen.append(len(ended))
    assert seen == [1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (("maths", [1]), r"request 2: it is of task 'maths'.*math"),
        (("math", [1] * 4000), "request 2: prompt 0 has 4000"),
    ],
)
def test_a_wrong_request_is_named_once_those_before_it_are_answered(base, wrong, message):
    tasks = {"math": adapters_of(base, MINIMAL, 1)}
    answers = serve(
        fuse(base, MINIMAL, tasks["math"]),
        tasks,
        iter([("math", [1]), ("math", [2]), wrong, ("math", [3])]),
        max_new_tokens=2,
    )
    assert [next(answers)[0], next(answers)[0]] == [0, 1]
    with pytest.raises(ConfigError, match=message):
        next(answers)


def test_what_is_drawn_does_not_depend_on_the_grouping(base):
    tasks = {"math": adapters_of(base, MINIMAL, 1), "chat": adapters_of(base, MINIMAL, 2)}
    requests = [(("math", "chat")[i % 2], PROMPTS[0]) for i in range(6)]

    def drawn(window):
        settings = {"max_new_tokens": 8, "window": window, "sampler": Sampler(1.0), "seed": 3}
        return dict(serve(fuse(base, MINIMAL, tasks["math"]), tasks, iter(requests), **settings))

    found = drawn(1)
    assert found == drawn(4) == drawn(64)
    assert found[0] != found[2] and found[1] != found[3]  # the same prompt again is drawn anew


def test_a_source_that_waits_for_its_answers(base):
    tasks, answered = {"math": adapters_of(base, MINIMAL, 1)}, []

    def source():
        for i in range(3):
            assert len(answered) == i  # the request before has been answered
            yield "math", PROMPTS[i]

    for number, _ in serve(
        fuse(base, MINIMAL, tasks["math"]), tasks, source(), max_new_tokens=2, window=1
    ):
        answered.append(number)
    assert answered == [0, 1, 2]
