"""What is said where transformers is missing or has other cache layers."""

import sys

import pytest
import transformers
from transformers import cache_utils as library

from merganser.errors import UnsupportedError
from merganser.runtime.libraries import cache_utils


def test_this_version_is_supported():
    assert cache_utils() is library


def test_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"needs transformers: pip install 'merganser\[transformers\]'"):
        cache_utils()


def test_other_layers(monkeypatch):
    class DynamicLayer:
        def get_mask_sizes(self, cache_position):
            pass

    monkeypatch.setattr(library, "DynamicLayer", DynamicLayer)
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(UnsupportedError, match=r"transformers 4\.57\.6 has other cache layers .*transformers>=5\.23"):
        cache_utils()
