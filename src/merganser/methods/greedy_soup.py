"""Greedy soup: average of the models with the best scores."""

from collections.abc import Mapping
from typing import Annotated, Any

from torch import Tensor

from ..method import Number, PerModel, Weight, merge_method
from ..ops import best, shares, weighted_sum

Kept = Annotated[int, Number(1, search=(1, 3))]


def check_keep(parameters: Mapping[str, Any]) -> str | None:
    """Return a complaint if `keep` exceeds the number of models, else None."""
    keep, n = parameters["keep"], len(parameters["score"])
    return f"keep must be at most the number of models, {n}, got {keep}" if keep > n else None


@merge_method(family="averages", cite="wortsman2022soups", validate=check_keep)
def greedy_soup(models: list[Tensor], *, score: PerModel[Weight], keep: Kept) -> Tensor:
    """Average the models that score best on held-out data.

        merged = mean of the `keep` models with the highest score

    Use when:
        Fine-tunes of one base on one task, with different seeds or settings, differ in quality, and the worse ones
        should not be part of the average.

    Args:
        score: Score of each model on held-out data, higher is better; negate a loss.
        keep: Number of models that are averaged. Of equal scores those named first are kept.

    Differs from the paper:
        The paper goes through the models in the order of their scores, and keeps each one only if the average scores
        better with it than without. That takes an evaluation per model, which a merge cannot do: find the number by a
        search, or leave models that did not help out of the recipe.
    """
    return weighted_sum(models, shares(best(score, keep).double()))
