"""Look up merge methods: one file each in `methods/`, and those of third-party packages through an entry point.

A package registers a method with

    [project.entry-points."merganser.methods"]
    my_method = "my_package.my_method:my_method"
"""

from __future__ import annotations

import copyreg
import importlib
from collections.abc import Callable
from typing import Any

from ..catalogue import canonical_name, factor_names, own_names, third_party, unknown_method
from ..errors import RecipeError
from .method import MergeMethod


def method_names() -> list[str]:
    """Return the names of all methods, sorted, without importing any of them."""
    return sorted(own_names() | set(third_party()))


def get_method(name: str) -> MergeMethod:
    """Return the method of that name, in any spelling that `canonical_name` takes.

    Raises:
        RecipeError: There is no such method, or the object that a third-party package registered is not a merge method
            or cannot be loaded.
    """
    name = canonical_name(name)
    if name in own_names():
        method = getattr(importlib.import_module(f"merganser.methods.{name}"), name)
    elif name in (third := third_party()):
        try:
            method = third[name].load()
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"merge method {name!r} of {third[name].value} cannot be loaded: {error}") from error
    elif name in factor_method_names():
        raise RecipeError(f"{name} merges adapters alone; every model of the recipe must be an adapter then")
    else:
        raise RecipeError(unknown_method(name))
    if not isinstance(method, MergeMethod):
        raise RecipeError(f"merge method {name!r} must be made with @merge_method, got {type(method).__name__}")
    return method


def factor_method_names() -> list[str]:
    """Return the names of the methods that work on the factors of adapters, sorted, without importing any."""
    return sorted(factor_names())


def get_factor_method(name: str) -> MergeMethod | None:
    """Return the method of that name that works on the factors of adapters; None if there is none."""
    if name not in factor_method_names():
        return None
    found = getattr(importlib.import_module(f"merganser.factor_methods.{name}"), name)
    assert isinstance(found, MergeMethod)
    return found


def get_method_for_adapters(name: str) -> MergeMethod:
    """Return the method that merges adapters under that name: one for factors if there is one, else one for models.

    Raises:
        RecipeError: There is no such method.
    """
    if name not in (*method_names(), *factor_method_names()):
        raise RecipeError(unknown_method(name))
    return get_factor_method(name) or get_method(name)


def every_method() -> dict[str, MergeMethod]:
    """Return every method that a recipe can name, those for adapters alone included, sorted by name."""
    found = {name: method for name in factor_method_names() if (method := get_factor_method(name)) is not None}
    return dict(sorted((found | methods()).items()))


def methods() -> dict[str, MergeMethod]:
    """Return every method by its name, sorted."""
    return {name: get_method(name) for name in method_names()}


def _by_name(method: MergeMethod) -> tuple[Callable[..., Any], tuple[str]]:
    """Pickle a method by its name: the process that unpickles it looks the name up in its registry."""
    return get_method, (method.name,)


copyreg.pickle(MergeMethod, _by_name)
