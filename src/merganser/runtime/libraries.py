"""transformers, in a version whose caches are made of layers that know how long a mask must be."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import UnsupportedError

__all__ = ["cache_utils"]


def cache_utils() -> Any:
    """Return the module `cache_utils` of transformers.

    Raises:
        UnsupportedError: transformers is not installed, or its cache layers have another interface.
    """
    try:
        import transformers
        from transformers import cache_utils
    except ImportError:
        raise UnsupportedError("merganser.runtime needs transformers: pip install 'merganser[transformers]'") from None
    layer = getattr(cache_utils, "DynamicLayer", None)
    if layer is None or "query_length" not in inspect.signature(layer.get_mask_sizes).parameters:
        raise UnsupportedError(
            f"merganser.runtime: transformers {transformers.__version__} has other cache layers (their get_mask_sizes takes "
            "no query_length); it was written for transformers 5.23: pip install 'transformers>=5.23'"
        )
    return cache_utils
