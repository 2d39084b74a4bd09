"""Merge methods, one file each; the file's name is the recipe's value.

The folder can be called: `merganser.methods()` returns every method by its name, those of other packages, too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..method import MergeMethod


class _Methods(ModuleType):
    """A module, since importing a file of this folder puts the module in the place of a function of its name."""

    def __call__(self) -> dict[str, MergeMethod]:
        """Return every method by its name, sorted."""
        from ..method.registry import methods

        return methods()


sys.modules[__name__].__class__ = _Methods
