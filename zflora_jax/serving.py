"""One fused model for requests of several tasks: grouped by task, the adapter blocks swapped between groups, nothing compiled anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from zflora_jax.adapters.fuse import pack, swap
from zflora_jax.decode import Sampler, generate_tokens
from zflora_jax.fields import nearest, require
from zflora_jax.model import Model
from zflora_jax.trees import Tree

Request = tuple[str, Sequence[int]]  # a task's name, and the token ids of a prompt


def serve(
    fused: Model,
    tasks: Mapping[str, Tree],
    requests: Iterable[Request],
    *,
    max_new_tokens: int,
    window: int = 64,
    batch_size: int = 16,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(number of the request from 0, the token ids generated) of every request, each as soon as its batch is done.

    fused: of any of the tasks' adapters (`fuse`); it is packed and kept, unless it is packed already: then its buffers are given to the first swap.
    tasks: name -> adapters of the AdapterConfig that `fused` has (`adapters.tasks.pad_adapters` brings smaller ones there).
    window: how many requests are read ahead. Of those that wait, the oldest one's task is answered next, all of its requests together, so that no
    request waits for more than a window. Greedy answers do not depend on the grouping; drawn ones do. ConfigError for a task that is not there.
    """
    require(window >= 1, f"window={window}: must be at least 1.")
    model, current = pack(fused), None
    numbered, waiting = enumerate(requests), deque[tuple[int, Request]]()
    while True:
        for number, request in islice(numbered, window - len(waiting)):
            require(request[0] in tasks, f"request {number} is of task {request[0]!r}; {nearest(request[0], tasks)}.")
            waiting.append((number, request))
        if not waiting:
            return
        task = waiting[0][1][0]
        if task != current:
            model, current = swap(model, tasks[task]), task
        group = [(number, request[1]) for number, request in waiting if request[0] == task]
        waiting = deque(entry for entry in waiting if entry[1][0] != task)
        prompts = [prompt for _, prompt in group]
        answers = generate_tokens(model, prompts, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed, batch_size=batch_size, stop=stop)
        yield from zip((number for number, _ in group), answers, strict=True)
