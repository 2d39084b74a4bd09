"""The mask of breadcrumbs, which removes both the largest and the smallest entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method import Statistic
from .order import comparable, order_statistic
from .rows import sort_rows
from .sum import deltas, l1_norms


def middle_cut() -> Statistic:
    """Declare the statistic of the largest and the smallest magnitude that are kept, shape [T, 2].

    Takes the parameters `density`, `gamma`, `precedence` and `by`, as in breadcrumbs.
    """
    return order_statistic(_magnitudes, _ranks, when=_cuts_tensor)


def keep_middle(
    base: Tensor,
    models: Sequence[Tensor],
    cut: Tensor | None,
    density: Tensor,
    gamma: Tensor,
    precedence: str,
    by: str,
) -> list[Tensor]:
    """Set the largest and the smallest entries of the task vectors to 0.

    Args:
        base: The base, shape [rows, columns].
        models: The models.
        cut: From `middle_cut`, or None where that is not needed.
        density: Share that is kept, one entry per model, shape [T].
        gamma: Share of the largest that is removed, shape [T].
        precedence: "gamma" or "density".
        by: "row": within each row; "tensor": within the tensor, by `cut`.
    """
    vectors = deltas(base, models)
    if by == "tensor" and cut is None:
        return vectors
    first, last = _span(density, gamma, precedence, base.shape[1])
    kept = []
    for i, delta in enumerate(vectors):
        size = delta.abs()
        if by == "row":
            cuts = _row_cuts(size, first[i], last[i])
        else:
            assert cut is not None
            size, cuts = comparable(size), (cut[i, 0], cut[i, 1])
        kept.append(torch.where((size <= cuts[0]) & (size >= cuts[1]), delta, torch.zeros_like(delta)))
    return kept


def middle_norms(
    base: Tensor,
    models: list[Tensor],
    cut: Tensor | None,
    density: Tensor,
    gamma: Tensor,
    precedence: str,
    by: str,
) -> Tensor:
    """Measure the L1 norms before and after `keep_middle`, shape [2, T]."""
    return l1_norms(deltas(base, models), keep_middle(base, models, cut, density, gamma, precedence, by))


def collides(density: tuple[float, ...], gamma: tuple[float, ...]) -> bool:
    """Return whether density + gamma exceeds 1 for a model, so that both shares cannot hold."""
    return any(d + g > 1 for d, g in zip(density, gamma, strict=True))


def _magnitudes(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    return [delta.abs() for delta in deltas(base, models)]


def _ranks(density: Tensor, gamma: Tensor, precedence: str, size: Tensor) -> Tensor:
    first, last = _span(density, gamma, precedence, size)
    # the cut of rank 0 is infinite, so nothing is kept
    return torch.stack([first, torch.where(last < first, 0.0, last)], dim=-1).to(torch.int64)


def _span(density: Tensor, gamma: Tensor, precedence: str, size: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return the ranks of the first and the last kept entry (rank 1 is the largest entry), float64, shape [T]."""
    kept = (density * size).floor()
    removed = (gamma * size).floor()
    if precedence == "density":
        removed = torch.minimum(removed, size - kept)
    return removed + 1, removed + kept


def _row_cuts(size: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest magnitude that are kept in each row, shape [rows, 1] each."""
    columns = size.shape[1]
    places = columns - torch.stack([first, last]).clamp(1, columns).long()
    cuts = sort_rows(size).index_select(1, places)
    # there is no rank from first to last, or all are beyond the end of the row
    empty = (last < first) | (first > columns)
    return cuts[:, :1], torch.where(empty, torch.inf, cuts[:, 1:])


def _cuts_tensor(by: str, precedence: str, density: tuple[float, ...], gamma: tuple[float, ...]) -> bool:
    removes = any(g > 0 for g in gamma) and precedence == "gamma"
    return by == "tensor" and (removes or any(d < 1 for d in density))
