"""transformers, in a version whose caches are made of layers."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import UnsupportedError

__all__ = ["cache_argument", "cache_utils"]


def cache_utils() -> Any:
    """Return the module `cache_utils` of transformers.

    Raises:
        UnsupportedError: transformers is not installed, or its caches have no layers.
    """
    try:
        import transformers
        from transformers import cache_utils
    except ImportError:
        raise UnsupportedError("merganser.runtime needs transformers: pip install 'merganser[transformers]'") from None
    if not hasattr(cache_utils, "DynamicLayer"):
        raise UnsupportedError(
            f"merganser.runtime: the caches of transformers {transformers.__version__} have no layers; those of 4.57.1 and "
            "later do: pip install --upgrade transformers"
        )
    return cache_utils


def cache_argument(model: Any) -> str:
    """Return the name of the argument by which a model takes a cache: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
