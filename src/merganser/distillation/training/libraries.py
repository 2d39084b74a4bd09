"""The trainer of transformers, which is only needed here."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedError

__all__ = ["peft", "transformers"]

_INSTALL = "which is not installed: pip install 'merganser[fusion]'"


def transformers() -> Any:
    """Return the module transformers.

    Raises:
        UnsupportedError: It, or accelerate, which its trainer needs, is not installed.
    """
    try:
        import transformers as library
    except ImportError:
        raise UnsupportedError(f"training needs transformers, {_INSTALL}") from None
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise UnsupportedError(f"training needs accelerate, {_INSTALL}") from None
    return library


def peft() -> Any:
    """Return the module peft.

    Raises:
        UnsupportedError: It is not installed.
    """
    try:
        import peft as library
    except ImportError:
        raise UnsupportedError(f"lora needs peft, {_INSTALL}") from None
    return library
