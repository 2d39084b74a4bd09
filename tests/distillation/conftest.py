"""Settings of the tests of fusion."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module")
def little_to_collect() -> None:
    """Have the garbage collector skip what is loaded already: accelerate calls it whenever a training begins."""
    gc.freeze()
