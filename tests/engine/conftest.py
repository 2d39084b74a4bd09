"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from tests.engine.interrupting import shrink_blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Most weights are large tensors of several segments, the rest is bundled."""
    shrink_blocks(monkeypatch)
