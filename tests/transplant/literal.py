"""Methods of transplanting, word for word in float64, one vector at a time; shares no code with src."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def omp(target: Array, rows: Array, k: int) -> dict[int, float]:
    """Goddard and Neto 2025, section 3: greedy choice by the product with the residual, then least squares."""
    chosen: list[int] = []
    residual = target.copy()
    for _ in range(k):
        products = np.abs(rows @ residual)
        products[chosen] = -1
        chosen.append(int(products.argmax()))
        solved = np.linalg.lstsq(rows[chosen].T, target, rcond=None)[0]
        residual = target - solved @ rows[chosen]
    return dict(zip(chosen, solved.tolist(), strict=True))


def interpolate(target: Array, rows: Array, k: int) -> dict[int, float]:
    distance = np.linalg.norm(rows - target, axis=1)
    near = np.argsort(distance)[:k]
    weight = 1 / distance[near]
    return dict(zip(near.tolist(), (weight / weight.sum()).tolist(), strict=True))


def barycentric(target: Array, rows: Array, k: int) -> dict[int, float]:
    """Least squares under the condition that the weights sum to 1, by its Karush-Kuhn-Tucker system."""
    near = np.argsort(np.linalg.norm(rows - target, axis=1))[:k]
    own = rows[near]
    system = np.zeros((k + 1, k + 1))
    system[:k, :k] = own @ own.T
    system[:k, k] = system[k, :k] = 1
    solved = np.linalg.solve(system, np.append(own @ target, 1.0))
    return dict(zip(near.tolist(), solved[:k].tolist(), strict=True))


def cosines(target: Array, rows: Array) -> Array:
    return rows @ target / np.linalg.norm(rows, axis=1) / np.linalg.norm(target)


def wechsel(target: Array, rows: Array, k: int) -> dict[int, float]:
    cosine = cosines(target, rows)
    near = np.argsort(-cosine)[:k]
    weight = np.exp(cosine[near] / 0.1)
    return dict(zip(near.tolist(), (weight / weight.sum()).tolist(), strict=True))


def focus(target: Array, rows: Array, k: int) -> dict[int, float]:
    """The projection on the simplex by bisection of its threshold."""
    cosine = cosines(target, rows)
    low, high = cosine.min() - 1, cosine.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(cosine - middle, 0).sum() > 1 else (low, middle)
    weight = np.maximum(cosine - low, 0)
    return {int(i): float(weight[i]) for i in np.flatnonzero(weight > 1e-12)}
