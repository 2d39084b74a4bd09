"""What methods measure of experts on text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .experts import Experts, Observed

__all__ = ["cosines", "gated_cosines", "mean_outputs", "output_cosines", "saliency"]

_CHUNK = 256
"""Tokens whose outputs by all experts are held at a time."""


def saliency(experts: Experts, seen: Observed) -> Tensor:
    """Return the mean over the tokens of an expert of its weight times the length of its output (REAP).

    Returns:
        Float64, shape [experts]; zero for experts that no token chose.
    """
    found = torch.zeros(experts.count, dtype=torch.float64)
    for expert in range(experts.count):
        rows = seen.chosen[:, expert]
        if bool(rows.any()):
            lengths = experts.outputs(expert, seen.inputs[rows]).double().norm(dim=1)
            found[expert] = (seen.gates[rows, expert].double() * lengths).mean()
    return found


def mean_outputs(experts: Experts, seen: Observed) -> Tensor:
    """Return the mean of every expert's outputs over all tokens, float64, shape [experts, width]."""
    return torch.stack([experts.outputs(e, seen.inputs).double().mean(0) for e in range(experts.count)])


def output_cosines(experts: Experts, seen: Observed) -> Tensor:
    """Return the mean over all tokens of the cosine of two experts' outputs, float64, shape [experts, experts]."""
    found = torch.zeros(experts.count, experts.count, dtype=torch.float64)
    for outputs, _ in _all_outputs(experts, seen):
        directions = torch.nn.functional.normalize(outputs, dim=-1)
        found += torch.einsum("etw,ftw->ef", directions, directions).double()
    return found / len(seen.inputs)


def gated_cosines(experts: Experts, seen: Observed) -> Tensor:
    """Return the cosine of two experts' outputs times their weights, over all tokens, float64, shape [experts, experts]."""
    found = torch.zeros(experts.count, experts.count, dtype=torch.float64)
    for outputs, gates in _all_outputs(experts, seen):
        gated = outputs * gates.T[..., None]
        found += torch.einsum("etw,ftw->ef", gated, gated).double()
    return _scaled(found)


def cosines(columns: Tensor) -> Tensor:
    """Return the cosine of each two columns, float64, shape [columns, columns]; of a zero column it is zero."""
    wide = columns.double()
    return _scaled(wide.T @ wide)


def _scaled(gram: Tensor) -> Tensor:
    lengths = gram.diagonal().sqrt()
    lengths = torch.where(lengths > 0, lengths, torch.inf)
    return gram / lengths[:, None] / lengths


def _all_outputs(experts: Experts, seen: Observed) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for some tokens at a time the outputs of all experts, [experts, tokens, width], and the weights."""
    for start in range(0, len(seen.inputs), _CHUNK):
        rows = seen.inputs[start : start + _CHUNK]
        outputs = torch.stack([experts.outputs(expert, rows) for expert in range(experts.count)])
        yield outputs, seen.gates[start : start + _CHUNK]
