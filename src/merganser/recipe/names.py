"""Names of methods and parameters, checked by the catalogue: before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..catalogue import described, factor_names, own_names, third_party, unknown_method
from ..errors import ParameterError, RecipeError, did_you_mean
from .fields.setting import Setting
from .keys import KEYS
from .model import Recipe
from .resolver import NO_EFFECT, parent

__all__ = ["check_names"]


def check_names(recipes: Sequence[Recipe]) -> None:
    """Refuse names that `check_recipe` would refuse; it checks everything else, too, but needs the method itself.

    Raises:
        RecipeError: There is no such method.
        ParameterError: The method has no such parameter.
    """
    known = own_names() | factor_names() | set(third_party())
    descriptions, _ = described()
    for recipe in recipes:
        if recipe.merge_method not in known:
            raise RecipeError(f"{recipe.place_of('merge_method')}: {unknown_method(recipe.merge_method)}")
        method = descriptions.get(recipe.merge_method)
        # some names stand for two methods, one for models and one for the factors of adapters
        two = method is not None and method.name in own_names() & factor_names()
        if method is None or two or recipe.compat == "mergekit":
            continue
        taken = [parameter.name for parameter in method.parameters]
        allowed = {*taken, *method.no_effect, *NO_EFFECT, *KEYS}
        for level in _levels(recipe):
            for name, setting in level.items():
                if name not in allowed:
                    raise ParameterError(_unknown(str(parent(setting.place)), name, method.name, taken))


def _unknown(where: str, name: str, method: str, taken: Sequence[str]) -> str:
    takes = ", ".join(sorted(taken)) or "no parameters"
    return f"{where}: unknown parameter {name!r} of {method}.{did_you_mean(name, taken)} {method} takes {takes}"


def _levels(recipe: Recipe) -> Iterator[Mapping[str, Setting]]:
    yield recipe.parameters
    for source in recipe.models:
        yield source.parameters
    for piece in recipe.slices:
        yield piece.parameters
        for source in piece.sources:
            yield source.parameters
