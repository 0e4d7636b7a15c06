"""The matmul precision of float32 products during tracing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import jax

F = TypeVar("F", bound=Callable[..., Any])


def at_precision(name: str) -> AbstractContextManager[Any]:
    """Context that traces float32 products at a matmul precision; "default" keeps jax's."""
    return nullcontext() if name == "default" else jax.default_matmul_precision(name)


def at_config_precision(function: F) -> F:
    """`function(config, ...)` with its float32 products at config.execution.matmul_precision."""

    @wraps(function)
    def traced(config: Any, *args: Any, **kwargs: Any) -> Any:
        with at_precision(config.execution.matmul_precision):
            return function(config, *args, **kwargs)

    return cast(F, traced)
