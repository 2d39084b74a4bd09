"""The sequences that the steps of the optimiser use, each as a batch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..data.batches import Batch, make_batches
from ..single.preparation import Prepared

__all__ = ["lined_up", "of_step", "usable"]


def usable(model: Prepared) -> list[Batch]:
    """Return the sequences of a model of which a token is predicted, in an order that the seed of the draw decides."""
    kept = [sample for sample in model.samples if any(sample.stacks[-1].counted[1:])]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(model.choice.seed)).tolist()
    return lined_up([make_batches([kept[i]], 1, model.pad_id)[0] for i in order])


def lined_up(batches: Sequence[Batch]) -> list[Batch]:
    """Return batches with the places of their tokens one after the other."""
    found: list[Batch] = []
    first: Sequence[int] = [0, 0]
    for batch in batches:
        stacks = tuple(replace(own, first=start) for own, start in zip(batch.stacks, first, strict=False))
        found.append(replace(batch, stacks=stacks))
        first = [own.first + own.rows for own in stacks]
    return found


def of_step(step: int, batch: int, count: int) -> list[int]:
    """Return the numbers of the sequences that a step uses: the next ones, over and over.

    Args:
        step: Number of the step, from 0.
        batch: Sequences in a step; all if there are fewer.
        count: Number of sequences.
    """
    return [(step * batch + i) % count for i in range(min(batch, count))]
