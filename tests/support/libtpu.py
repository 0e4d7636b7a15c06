"""The mark of tests that compile for TPUs."""

from __future__ import annotations

import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra target-tpu"
)
