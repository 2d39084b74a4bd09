"""Item response theory: how probable a right answer is, by the ability of a model and the parameters of an item.

The probability is sigmoid(a . ability - b), with the discrimination a and the difficulty b of the item (two-parameter logistic model).
Source: Polo et al., tinyBenchmarks, ICML 2024; Mencattini et al., MERGE3, ICML 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True)
class Items:
    """The parameters of items.

    Args:
        discrimination: float64, shape [items, abilities].
        difficulty: float64, shape [items].
    """

    discrimination: Numbers
    difficulty: Numbers

    def at(self, where: NDArray[np.int64]) -> Items:
        """Return some of the items."""
        return Items(self.discrimination[where], self.difficulty[where])

    def probability(self, ability: Numbers) -> Numbers:
        """Return the probability that a model answers each item rightly, shape [items].

        Args:
            ability: Shape [abilities].
        """
        # tanh does not overflow
        return np.asarray(0.5 + 0.5 * np.tanh((self.discrimination @ ability - self.difficulty) / 2), np.float64)

    def loss(self, ability: Numbers, answers: Numbers) -> tuple[float, Numbers]:
        """Return the negative log-likelihood of answers, and its gradient with respect to the ability."""
        logits = self.discrimination @ ability - self.difficulty
        value = float((np.logaddexp(0.0, logits) - answers * logits).sum())
        return value, self.discrimination.T @ (self.probability(ability) - answers)


@dataclass(frozen=True)
class Seen:
    """What a merged model answered on some of the items.

    Args:
        items: All items.
        where: Places of those that it saw, int64, shape [seen].
        answers: 1 for each right answer and 0 for each wrong one, float64, shape [seen].
        parents: Abilities of the models that were merged, shape [models, abilities].
    """

    items: Items
    where: NDArray[np.int64]
    answers: Numbers
    parents: Numbers

    @property
    def mean(self) -> float:
        """Accuracy on the items that it saw."""
        return float(self.answers.mean())

    def fill(self, ability: Numbers) -> float:
        """Return the accuracy on all items: the answers that are known, and the probabilities of the others."""
        count = len(self.items.difficulty)
        unseen = np.setdiff1d(np.arange(count), self.where)
        return float((self.answers.sum() + self.items.at(unseen).probability(ability).sum()) / count)


class Estimator(Protocol):
    """Estimates the accuracy of a model on all items; if all were seen, it is their mean."""

    def __call__(self, seen: Seen) -> float:
        """Return the accuracy, from 0 to 1."""


def fit_ability(items: Items, answers: Numbers) -> Numbers:
    """Return the most probable ability of a model, shape [abilities].

    A standard normal prior keeps it finite where all answers are right, or all wrong; the published code has none.

    Args:
        items: Items, of the same order as the answers.
        answers: Answers, shape [items].
    """

    def loss(ability: Numbers) -> tuple[float, Numbers]:
        value, slope = items.loss(ability, answers)
        return value + 0.5 * float(ability @ ability), slope + ability

    return _minimum(loss, np.zeros(items.discrimination.shape[1]), method="L-BFGS-B", options={"ftol": 1e-14})


def fit_mixture(items: Items, answers: Numbers, parents: Numbers) -> Numbers:
    """Return the most probable ability among the mixtures of the parents' abilities, shape [abilities].

    The shares are at least 0 and sum to 1. The published code leaves them free: with more parents than abilities these are then
    not determined, and the parents say nothing.

    Args:
        items: Items, of the same order as the answers.
        answers: Answers, shape [items].
        parents: Abilities of the parents, shape [models, abilities].
    """
    count = len(parents)

    def loss(shares: Numbers) -> tuple[float, Numbers]:
        value, slope = items.loss(shares @ parents, answers)
        return value / len(answers), parents @ slope / len(answers)

    shares = _minimum(
        loss,
        np.full(count, 1 / count),
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda s: s.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-13, "maxiter": 500},
    )
    return np.asarray(shares @ parents, np.float64)


def _minimum(loss: Any, start: Numbers, **options: Any) -> Numbers:
    from scipy.optimize import minimize

    return np.asarray(minimize(loss, start, jac=True, **options).x, np.float64)
