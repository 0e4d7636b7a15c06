"""One fused model for requests of several tasks: grouped by task, the adapter blocks swapped
between groups. Nothing is compiled anew for a task; groups are filled up to few sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Unpack

from zflora_jax.adapters.fuse import swap
from zflora_jax.adapters.packing import pack_for_decode
from zflora_jax.core.fields import ConfigError, nearest, require
from zflora_jax.core.model import Model
from zflora_jax.core.trees import Tree
from zflora_jax.inference.batching import check_prompts
from zflora_jax.inference.decode import answer_batches, checked
from zflora_jax.inference.generation_config import (
    GenerationConfig,
    GenerationSettings,
    generation_config,
)

Request = tuple[str, Sequence[int]]  # a task's name, and the token ids of a prompt


def serve(
    fused: Model,
    tasks: Mapping[str, Tree],
    requests: Iterable[Request],
    config: GenerationConfig | None = None,
    *,
    window: int = 64,
    **settings: Unpack[GenerationSettings],
) -> Iterator[tuple[int, list[int]]]:
    """Answer requests of several tasks, each as soon as its batch is done.

    Of the requests that wait, the oldest one's task is answered next, all of its requests together,
    so that no request waits for more than a window. Answers do not depend on the grouping.

    Args:
      fused: fused with the adapters of any of the tasks. It is packed and kept, unless it is packed
        already (on a mesh: has its layers apart): then its buffers are given to the first swap.
      tasks: name -> adapters of the AdapterConfig that `fused` has (`pad_adapters` brings smaller
        ones there).
      requests: (name of a task, token ids of a prompt).
      config: how to generate; None for the defaults of `GenerationConfig`.
      window: how many requests are read ahead; 1 is for a source whose next request comes after an
        answer.
      settings: fields of `GenerationConfig`, in place of those of `config`.

    Yields:
      (number of the request from 0, the token ids generated).

    Raises:
      ConfigError: a task that is not there, or a prompt that does not fit; it names the request,
        once those before it are answered.
    """
    config = checked(fused, generation_config(config, settings))
    require(window >= 1, f"window={window}: must be at least 1.")
    model, current, refused = pack_for_decode(fused), None, None
    numbered, waiting = enumerate(requests), deque[tuple[int, Request]]()
    while True:
        for number, request in islice(numbered, 0 if refused else window - len(waiting)):
            try:
                require(
                    request[0] in tasks,
                    f"it is of task {request[0]!r}; {nearest(request[0], tasks)}.",
                )
                check_prompts(model, [request[1]], config.max_new_tokens)
            except ConfigError as error:
                refused = ConfigError(f"request {number}: {error}")
                break
            waiting.append((number, request))
        if not waiting:
            if refused:
                raise refused
            return
        task = waiting[0][1][0]
        if task != current:
            model, current = swap(model, tasks[task]), task
        group = [(number, request[1]) for number, request in waiting if request[0] == task]
        waiting = deque(entry for entry in waiting if entry[1][0] != task)
        prompts, numbers = [prompt for _, prompt in group], [number for number, _ in group]
        for rows, answers in answer_batches(model, prompts, config, numbers):
            yield from sorted(zip([numbers[i] for i in rows], answers, strict=True))
