"""Inputs that are read from the Hub by ranges while they are merged: how much is fetched, and what does not go with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import UnsupportedError
from .memory import kept_bytes

if TYPE_CHECKING:
    from ...method import MergeMethod
    from ...recipe import ModelReference, Recipe
    from .plan import Plan

__all__ = ["check_stream", "fetched_bytes", "refuse_calibration"]


def refuse_calibration(recipes: Sequence[Recipe]) -> None:
    """Refuse recipes whose models are calibrated first.

    Raises:
        UnsupportedError: There is one.
    """
    for recipe in recipes:
        if recipe.names_data:
            raise UnsupportedError(
                f"{recipe.place}: --stream: the models are calibrated on data, for which they are read whole and several times; "
                "leave --stream out"
            )


def check_stream(recipe: Recipe, method: MergeMethod) -> None:
    """Refuse a merge that reads its inputs more often than its plan says.

    Raises:
        UnsupportedError: It is such a merge.
    """
    if recipe.align is not None:
        raise UnsupportedError(
            f"{recipe.place_of('align')}: --stream: models are read once more to align them; leave --stream out"
        )
    if method.sidecar is not None:
        raise UnsupportedError(
            f"{recipe.place_of('merge_method')}: --stream: {method.name} reads its models again and again, to make what restores "
            "each of them; leave --stream out"
        )


def fetched_bytes(plan: Plan, reference: ModelReference) -> int:
    """Return the bytes of a model that are fetched in all passes together, at most."""
    own = {id(tensor) for tensor in plan.checkpoints[reference].tensors.values()}
    passes = {id(t.parameters): t.passes for t in plan.distinct}
    total = 0
    for t in plan.tensors:
        once = sum(part.nbytes for source in t.inputs if id(source) in own for part in source.remotes)
        kept = 0 < kept_bytes(t) <= plan.kept or (t.in_one_block and not plan.whole_model)
        total += once if t.copy or kept else once * passes[id(t.parameters)]
    return total
