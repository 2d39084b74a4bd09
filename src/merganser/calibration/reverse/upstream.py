"""The gradient that the reverse pass hands from block to block, and its place on disk."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...errors import OutputError
from ...jsonfile import os_reason

__all__ = ["Upstream", "UpstreamFiles"]


@dataclass
class Upstream:
    """The gradient of one sequence's loss, after some blocks have been visited from the last one on.

    Args:
        hidden: By stack, with respect to the hidden states that the next block to visit returned.
        rest: By stack, the same for the further values of the tuple that it returned; None where there is none.
        outside: With respect to parameters outside the blocks, as far as visited blocks depend on them, by name: the
            indices of the rows that are not zero, and these rows (only the rows of an embedding that the sequence uses
            have a gradient).
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    rest: dict[int, list[Tensor | None]] = field(default_factory=dict)
    outside: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add_outside(self, name: str, gradient: Tensor) -> None:
        """Add to the gradient with respect to a parameter outside the blocks."""
        if name in self.outside:
            gradient = self.outside_gradient(name, gradient)
        rows = gradient.reshape(len(gradient), -1).any(1).nonzero()[:, 0]
        self.outside[name] = (rows, gradient[rows])

    def outside_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """Return the sum of a gradient with respect to a parameter and what visited blocks add to it."""
        if name not in self.outside:
            return gradient
        rows, values = self.outside[name]
        return gradient.index_add(0, rows, values)


class UpstreamFiles:
    """One file per sequence and direction: a block reads those of the block after it, and writes its own.

    Args:
        folder: The folder; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, visited: int, number: int, upstream: Upstream) -> None:
        """Store what a sequence's reverse pass has come to.

        Args:
            visited: Number of blocks that have been visited.
            number: Index of the sequence.
            upstream: The gradient.

        Raises:
            OutputError: The disk is full or failed.
        """
        path = self._path(visited, number)
        try:
            torch.save((upstream.hidden, upstream.rest, upstream.outside), path)
        except (OSError, RuntimeError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else str(error)
            raise OutputError(f"{path}: cannot be written: {reason}; make room, or choose another disk") from None

    def read(self, visited: int, number: int) -> Upstream:
        """Return what `write` stored.

        Raises:
            OutputError: The file is missing or damaged.
        """
        path = self._path(visited, number)
        try:
            return Upstream(*torch.load(path, weights_only=True))
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise OutputError(f"{path}: cannot be read: {error}; start again") from None

    def _path(self, visited: int, number: int) -> Path:
        # two files in turn, so that a block that is killed half-way still finds what it reads
        return self._folder / f"upstream-{visited % 2}-{number}.pt"
