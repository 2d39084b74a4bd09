"""The gradient that the reverse pass hands from block to block, and its place on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..output.torchfile import load_working, save_working
from .gradient import Gradient

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

    def add_outside(self, name: str, gradient: Gradient, parameter: Tensor) -> None:
        """Add to the gradient with respect to a parameter outside the blocks."""
        total = Gradient(rows=self.outside.get(name))
        total.add_rows(*gradient.as_rows(parameter))
        if total.rows is not None:
            self.outside[name] = total.rows


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
        save_working((upstream.hidden, upstream.rest, upstream.outside), self._path(visited, number))

    def read(self, visited: int, number: int) -> Upstream:
        """Return what `write` stored.

        Raises:
            OutputError: The file is missing or damaged.
        """
        return Upstream(*load_working(self._path(visited, number)))

    def keep(self, name: str, value: object) -> None:
        """Store something until the end of the reverse pass.

        Raises:
            OutputError: The disk is full or failed.
        """
        save_working(value, self._folder / f"{name}.pt")

    def kept(self, name: str) -> Any:
        """Return what `keep` stored.

        Raises:
            OutputError: The file is missing or damaged.
        """
        return load_working(self._folder / f"{name}.pt")

    def _path(self, visited: int, number: int) -> Path:
        # two files in turn, so that a block that is killed half-way still finds what it reads
        return self._folder / f"upstream-{visited % 2}-{number}.pt"
