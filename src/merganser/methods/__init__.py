"""Merge methods, one file each, named like the method in recipes.

The package is callable: `merganser.methods()` returns every method by its name, including those of other packages.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..method import MergeMethod


class _Methods(ModuleType):
    """A callable module, because importing it replaces any function `merganser.methods` by the module."""

    def __call__(self) -> dict[str, MergeMethod]:
        """Return every method by its name, sorted."""
        from ..method.registry import methods

        return methods()


sys.modules[__name__].__class__ = _Methods
