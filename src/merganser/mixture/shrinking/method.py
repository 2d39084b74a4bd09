"""What a method for shrinking a mixture is, and what several of them do alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.permutation.assignment import assign
from .experts import Experts, Observed
from .grouping import Groups

__all__ = ["Reduced", "ShrinkingMethod", "aligned", "merge_groups", "router_means", "shares"]


@dataclass(frozen=True)
class Reduced:
    """A layer with fewer experts.

    Args:
        groups: The experts that each new one is made of. Where this is a single one, it is copied.
        experts: The new experts.
        router: The new router's rows as sums of the old ones, float64, shape [new, old]. Biases follow.
    """

    groups: Groups
    experts: Experts
    router: Tensor


@dataclass(frozen=True)
class ShrinkingMethod:
    """A method for shrinking a mixture.

    Args:
        name: Its name.
        cite: Key in `references.bib`.
        summary: What it does, in a line.
        reduce: Makes a layer with a number of experts of a layer's experts and what was observed of them.
    """

    name: str
    cite: str
    summary: str
    reduce: Callable[[Experts, Observed, int], Reduced]


def shares(scores: Tensor, members: Sequence[int]) -> Tensor:
    """Return the members' scores over their sum; equal shares if all are zero. Float64, shape [members]."""
    own = scores[list(members)].double()
    total = own.sum()
    return own / total if bool(total > 0) else torch.full_like(own, 1 / len(own))


def router_means(groups: Groups, scores: Tensor) -> Tensor:
    """Return a router whose rows are the means of the groups' rows, weighted by `scores`."""
    found = torch.zeros(len(groups), len(scores), dtype=torch.float64)
    for row, members in enumerate(groups):
        found[row, members] = shares(scores, members)
    return found


def merge_groups(experts: Experts, groups: Groups, scores: Tensor, *, align: bool) -> Experts:
    """Average the experts of every group, weighted by `scores`.

    Args:
        experts: The experts.
        groups: The groups.
        scores: A score per expert.
        align: Whether the hidden units of the members are first put into the order of the group's centre.
    """
    found = []
    for members in groups:
        own = experts.chosen(members)
        own = aligned(own) if align and len(members) > 1 else own
        found.append(own.averaged(shares(scores, members)))
    return Experts.joined(found)


def aligned(experts: Experts) -> Experts:
    """Put the hidden units of all experts into the order that is most like that of the first; none computes anything else.

    Raises:
        UnsupportedError: The matching needs SciPy, and it is not installed.
    """
    found = [experts.chosen([0])]
    for expert in range(1, experts.count):
        scores = sum(part[0].double() @ part[expert].double().T for part in experts.units.values())
        assert isinstance(scores, Tensor)
        order = assign(scores.numpy())
        own = experts.chosen([expert])
        units = {name: part[:, torch.from_numpy(order)] for name, part in own.units.items()}
        found.append(Experts(units, own.output_bias, own.activate))
    return Experts.joined(found)
