"""Merge methods of every contract, of which only the signatures matter, and recipes for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
from torch import Tensor

from merganser.errors import MergeError, RecipeError
from merganser.method import Count, Fraction, Ignored, MergeMethod, PerModel, Scale, Weight, default, merge_method
from merganser.recipe import ModelReference, Resolver, load_recipe


def _check_densities(parameters: Mapping[str, Any]) -> str | None:
    return None if any(parameters["density"]) else "all densities are 0"


def _goes_round(rounds: int, density: tuple[float, ...]) -> bool:
    return rounds > 1 or min(density) < 1


@merge_method(
    family="toys",
    cite="-",
    mergekit={"rule": "loose", "rescale": Ignored("nothing is dropped")},
    when={"rule": _goes_round},
    validate=_check_densities,
)
def with_base(
    base: Tensor,
    models: list[Tensor],
    *,
    weight: PerModel[Weight],
    density: PerModel[Fraction] = default(1.0),
    lambda_: Scale = default(1.0),
    normalize: bool = True,
    rounds: Count = 3,
    rule: Literal["strict", "loose"] = "strict",
) -> Tensor:
    """Toy with a base.

    Args:
        weight: Factor of each model.
        density: Share of each model.
        lambda_: Factor of all.
        normalize: Divide.
        rounds: How often.
        rule: Which of two.
    """
    raise AssertionError


@merge_method(family="toys", cite="-", models=(1, 1))
def along(base: Tensor, models: list[Tensor], *, t: Fraction) -> Tensor:
    """Toy of two models, one of them the base.

    Args:
        t: Position.
    """
    raise AssertionError


@merge_method(family="toys", cite="-", models=(2, 2))
def maybe_base(base: Tensor | None, models: list[Tensor], *, weight: PerModel[Weight] = default(0.5)) -> Tensor:
    """Toy with an optional base.

    Args:
        weight: Factor of each model.
    """
    raise AssertionError


@merge_method(family="toys", cite="-")
def no_base(models: list[Tensor], *, weight: PerModel[Weight] = default(1.0)) -> Tensor:
    """Toy without a base.

    Args:
        weight: Factor of each model.
    """
    raise AssertionError


def resolve(method: MergeMethod, text: str) -> Resolver:
    return Resolver(load_recipe(f"merge_method: {method.name}\n{text}"), method)


def refusal(method: MergeMethod, text: str, kind: type[MergeError] = RecipeError) -> str:
    with pytest.raises(kind) as caught:
        resolve(method, text)
    assert type(caught.value) is kind
    return str(caught.value)


def inputs(resolver: Resolver, piece: int = 0) -> tuple[ModelReference | None, ...]:
    """Return the base, and the models in order."""
    found = resolver.sources(piece)
    return (found.base.model if found.base else None, *(source.model for source in found.models))


def values(resolver: Resolver, name: str, inputs: str | None = None, t: float = 0.0, piece: int = 0) -> dict[str, Any]:
    count = len(resolver.sources(piece).models)
    return dict(resolver.parameters(piece, name, [inputs or name] * count, t))
