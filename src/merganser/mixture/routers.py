"""Routers that need no forward: random ones, and ones from the embeddings of prompts; and what all routers share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError

__all__ = ["Routers", "condition", "direction", "random_rows", "right_share"]


@dataclass(frozen=True)
class Routers:
    """The routers of a mixture.

    Args:
        rows: For every layer, a row per expert, float32, shape [experts, hidden].
        gates: For every layer, the gate of the shared expert, float32, shape [1, hidden]; empty without one.
        report: What is known of them, as plain data.
    """

    rows: list[Tensor]
    gates: list[Tensor] = field(default_factory=list)
    report: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a hash of all values."""
        found = hashlib.sha256()
        for each in (*self.rows, *self.gates):
            found.update(each.contiguous().numpy().tobytes())
        return found.hexdigest()


def random_rows(seed: int, name: str, rows: int, width: int, *, uniform: bool) -> Tensor:
    """Draw a router: standard normal, or uniform as `torch.nn.Linear` begins; the same on every machine.

    Args:
        seed: Seed of the recipe.
        name: Name of the tensor, so that layers differ.
        rows: Number of experts.
        width: Hidden size.
        uniform: Whether to draw from U(-1/sqrt(width), 1/sqrt(width)).

    Returns:
        Shape [rows, width], float32.
    """
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest(), "little")
    draw = np.random.Generator(np.random.Philox(key=key))
    bound = width**-0.5
    values = draw.uniform(-bound, bound, (rows, width)) if uniform else draw.standard_normal((rows, width))
    return torch.from_numpy(values.astype(np.float32))


def direction(positive: Tensor, negative: Tensor | None, what: str) -> Tensor:
    """Return the unit vector of a mean, with that of negative prompts subtracted.

    Args:
        positive: Shape [prompts, hidden].
        negative: Shape [prompts, hidden]; None without negative prompts.
        what: The expert, for the message.

    Raises:
        CheckpointError: The two cancel, so that there is no direction.
    """
    found = positive.double().mean(0)
    if negative is not None and len(negative):
        found = found - negative.double().mean(0)
    length = found.norm()
    if not (length.isfinite() and length > 0):
        raise CheckpointError(
            f"{what}: its prompts give no direction for the router: positive and negative ones cancel; change one of them"
        )
    unit: Tensor = found / length
    return unit.float()


def condition(rows: Tensor) -> float | None:
    """Return the ratio of a router's largest and smallest singular value; None where rows depend on each other."""
    values = torch.linalg.svdvals(rows.double())
    return float(values[0] / values[-1]) if float(values[-1]) > 1e-12 * float(values[0]) else None


def right_share(rows: Tensor, inputs: Sequence[Tensor]) -> tuple[list[float | None], list[float]]:
    """Return which share of each expert's own inputs goes to it first, and which share of all each expert gets.

    All domains count alike, whatever the number of their inputs.

    Args:
        rows: The router, shape [experts, hidden].
        inputs: For each expert, its inputs, shape [n, hidden].
    """
    share: list[float | None] = []
    load = torch.zeros(len(rows), dtype=torch.float64)
    for expert, own in enumerate(inputs):
        if not len(own):
            share.append(None)
            continue
        chosen = (own.float() @ rows.T).argmax(1)
        share.append(float((chosen == expert).double().mean()))
        load += torch.bincount(chosen, minlength=len(rows)).double() / len(own)
    return share, (load / load.sum().clamp_min(1e-30)).tolist()
