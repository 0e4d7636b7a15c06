"""Studies add methods of their own; other tests in this process have those of the package."""

from collections.abc import Iterator

import pytest

from zflora_jax.core.adapter_config import METHODS


@pytest.fixture(scope="module", autouse=True)
def the_methods_of_the_package() -> Iterator[None]:
    kept = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(kept)
