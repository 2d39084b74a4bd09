"""Fit the parameters of items to the answers of models that saw all of them."""

from __future__ import annotations

import numpy as np

from .irt import Items, Numbers

_DISCRIMINATING = 12
"""Fewest models from which the discrimination of items is fitted; with fewer it is 1 (one-parameter model)."""
_DIFFICULTY = 2.0
"""Standard deviation of the normal prior of difficulties."""
_DISCRIMINATION = 0.5
"""Standard deviation of the normal prior of the logarithm of discriminations."""


def fit_items(answers: Numbers) -> Items:
    """Return the most probable parameters of items, with one ability.

    Abilities have a standard normal prior, which sets the scale.

    Args:
        answers: 1 for right and 0 for wrong, float64, shape [models, items]; at least one model.
    """
    from scipy.optimize import minimize

    models, count = answers.shape
    sharp = models >= _DISCRIMINATING

    def loss(point: Numbers) -> tuple[float, Numbers]:
        ability, difficulty, logs = np.split(point, [models, models + count])
        scale = np.exp(logs) if sharp else np.ones(count)
        logits = np.outer(ability, scale) - difficulty
        value = (np.logaddexp(0.0, logits) - answers * logits).sum()
        value += ability @ ability / 2 + difficulty @ difficulty / (2 * _DIFFICULTY**2)
        value += logs @ logs / (2 * _DISCRIMINATION**2)
        rest = 0.5 + 0.5 * np.tanh(logits / 2) - answers
        slopes = [rest @ scale + ability, difficulty / _DIFFICULTY**2 - rest.sum(0)]
        slopes.append(ability @ rest * scale + logs / _DISCRIMINATION**2 if sharp else logs)
        return float(value), np.concatenate(slopes)

    level = answers.mean(1)
    start = np.concatenate([4 * (level - level.mean()), 2 - 4 * answers.mean(0), np.zeros(count if sharp else 0)])
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-7}
    point = np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x, np.float64)
    _, difficulty, logs = np.split(point, [models, models + count])
    return Items((np.exp(logs) if sharp else np.ones(count))[:, None], difficulty)
