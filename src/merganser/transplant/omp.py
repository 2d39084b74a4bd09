"""Orthogonal matching pursuit: a vector as a combination of few rows of a matrix, for many vectors at once.

Goddard and Neto, "Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit", 2025.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["matching_pursuit"]

BATCH = 256
"""Vectors that are pursued together."""

_BLOCK = 64
"""Columns of which only the largest is looked at first."""

_CANDIDATES = 8
"""Rows whose products are computed exactly before one is chosen."""

_NOTHING_LEFT = 1e-6
"""Residual, relative to the vector, below which the pursuit ends."""

_RESULT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
"""Bound on the relative error with which a product is stored."""

_TERM = 2.0**-23
"""Bound on the error of each addition of a product, as a share of the product of both norms."""


def matching_pursuit(
    targets: Tensor, rows: Tensor, k: int, *, threads: int = 1, advance: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Approximate each vector by at most k rows of a matrix.

    Each step takes the row with the largest absolute product with the residual (rows are not normalised), and makes the
    residual orthogonal to it and all rows taken before. Products of all rows are computed in bfloat16 where that is
    faster; the few that may be the largest, by a bound on the rounding error, are computed again in float64, so the
    choice does not depend on it. Coefficients come from a QR decomposition in float64.

    Args:
        targets: The vectors, float32, shape [n, d].
        rows: The rows, float32, shape [v, d].
        k: Largest number of rows for each vector; also at most v and d.
        threads: Batches that are worked on at the same time; the result does not depend on it.
        advance: Called with the number of vectors done.

    Returns:
        The indices of the rows, int64, shape [n, k], and their coefficients, float64, shape [n, k]. Where the pursuit
        ended early, the rest has coefficients of zero.
    """
    k = min(k, *rows.shape)
    matrix = _Matrix(rows, _fastest(rows))
    indices = torch.zeros(len(targets), k, dtype=torch.int64)
    coefficients = torch.zeros(len(targets), k, dtype=torch.float64)

    def do(start: int) -> None:
        part = slice(start, start + BATCH)
        indices[part], coefficients[part] = _pursue(targets[part], matrix, k)
        if advance is not None:
            advance(len(targets[part]))

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(do, range(0, len(targets), BATCH)))
    finally:
        torch.set_num_threads(before)
    return indices, coefficients


class _Matrix:
    """The rows, exactly and in the dtype of the approximate products."""

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        self.rows = rows
        self.rough = torch.nn.functional.pad(rows.to(dtype), (0, 0, 0, -len(rows) % _BLOCK))
        self.longest = float(rows.norm(dim=1).max())
        # zero for a donor that is stored in bfloat16
        self.off = float((rows - rows.to(dtype).float()).norm(dim=1).max())

    def best(self, residual: Tensor) -> Tensor:
        """Return for each residual the row with the largest absolute product; of equal ones, the first.

        Args:
            residual: Shape [n, d], float32.
        """
        rounded = residual.to(self.rough.dtype)
        # shape [rows, residuals], so that the largest of a block is found along contiguous memory
        products = self.rough @ rounded.T
        blocks = products.view(-1, _BLOCK, len(residual))
        largest = torch.maximum(blocks.amax(1), -blocks.amin(1)).float().T
        peaks, places = largest.topk(min(_CANDIDATES, largest.shape[1]), dim=1)
        columns = (places[:, :, None] * _BLOCK + torch.arange(_BLOCK)).flatten(1)
        inside = products[columns, torch.arange(len(residual))[:, None]].abs().float()
        some = min(_CANDIDATES, inside.shape[1])
        values, order = inside.topk(some, dim=1)
        candidates = columns.gather(1, order).clamp_max(len(self.rows) - 1)
        chosen = self._largest(residual, candidates)
        # where the last candidate might still be the largest, there may be more
        floor = peaks[:, 0] - 2 * self._error(residual, rounded, peaks[:, 0])
        for i in torch.nonzero((values[:, -1] >= floor) & (some < len(self.rows)))[:, 0].tolist():
            near = torch.nonzero(products[: len(self.rows), i].abs().float() >= floor[i])[:, 0]
            chosen[i] = self._largest(residual[i : i + 1], near[None])[0]
        return chosen

    def _error(self, residual: Tensor, rounded: Tensor, peak: Tensor) -> Tensor:
        """Return a bound on the error of the approximate products of each residual, shape [n]."""
        size = residual.norm(dim=1)
        lost = (residual - rounded.float()).norm(dim=1)
        inputs = lost * (self.longest + self.off) + size * self.off
        bound: Tensor = inputs + _TERM * residual.shape[1] * size * self.longest + _RESULT[self.rough.dtype] * peak
        return bound

    def _largest(self, residual: Tensor, candidates: Tensor) -> Tensor:
        """Return the candidate with the largest absolute product, computed in float64."""
        candidates = candidates.sort(dim=1).values
        exact = (self.rows[candidates].double() @ residual.double()[:, :, None])[:, :, 0].abs()
        return candidates.gather(1, exact.argmax(dim=1, keepdim=True))[:, 0]


def _pursue(targets: Tensor, matrix: _Matrix, k: int) -> tuple[Tensor, Tensor]:
    """Pursue one batch; see `matching_pursuit`."""
    n, d = targets.shape
    residual = targets.clone()
    basis = torch.zeros(n, k, d)
    chosen = torch.zeros(n, k, dtype=torch.int64)
    counts = torch.zeros(n, dtype=torch.int64)
    sizes = targets.norm(dim=1)
    active = torch.nonzero(sizes > 0)[:, 0]
    for step in range(k):
        if not len(active):
            break
        own = residual[active]
        best = matrix.best(own)
        direction = matrix.rows[best]
        before = direction.norm(dim=1)
        earlier = basis[active, :step]
        # twice: once loses orthogonality where a row is nearly a combination of the others
        for _ in range(2 if step else 0):
            direction = direction - ((earlier @ direction[:, :, None]).mT @ earlier)[:, 0]
        length = direction.norm(dim=1)
        fresh = length > _NOTHING_LEFT * before
        active, direction = active[fresh], direction[fresh] / length[fresh, None]
        own, best = own[fresh], best[fresh]
        basis[active, step] = direction
        chosen[active, step] = best
        counts[active] = step + 1
        residual[active] = own - (own * direction).sum(1, keepdim=True) * direction
        active = active[residual[active].norm(dim=1) > _NOTHING_LEFT * sizes[active]]
    return chosen, _solve(targets, matrix.rows, chosen, counts)


def _solve(targets: Tensor, rows: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
    """Return the least-squares coefficients of the chosen rows, float64."""
    coefficients = torch.zeros(chosen.shape, dtype=torch.float64)
    for count in set(counts.tolist()) - {0}:
        mine = torch.nonzero(counts == count)[:, 0]
        for part in torch.split(mine, 32):
            q, r = torch.linalg.qr(rows[chosen[part, :count]].double().mT)
            right = q.mT @ targets[part].double()[:, :, None]
            coefficients[part, :count] = torch.linalg.solve_triangular(r, right, upper=True)[:, :, 0]
    return coefficients


def _fastest(rows: Tensor) -> torch.dtype:
    """Return the dtype in which products are faster here: bfloat16 where the processor multiplies it, else float32."""
    sample = rows[:2048]
    if sample.numel() < 1 << 18:
        return torch.float32
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        own = sample.to(dtype)
        own[:64] @ own.T
        start = time.process_time()
        own[:64] @ own.T
        taken[dtype] = time.process_time() - start
    return min(taken, key=lambda dtype: taken[dtype])
