"""Studies add methods of their own; other tests in this process have those of the package."""

from collections.abc import Iterator

import pytest

import zflora_jax as zf


@pytest.fixture(scope="module", autouse=True)
def the_methods_of_the_package() -> Iterator[None]:
    kept = dict(zf.METHODS)
    yield
    zf.METHODS.clear()
    zf.METHODS.update(kept)
