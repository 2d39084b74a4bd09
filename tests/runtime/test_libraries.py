"""What is said where transformers is missing or too old."""

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


def test_other_caches(monkeypatch):
    monkeypatch.delattr(library, "DynamicLayer")
    monkeypatch.setattr(transformers, "__version__", "4.50.0")
    with pytest.raises(
        UnsupportedError, match=r"the caches of transformers 4\.50\.0 have no layers; .*4\.57\.1 and later"
    ):
        cache_utils()
