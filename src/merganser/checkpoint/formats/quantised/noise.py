"""How far rounding to a coarse grid may have moved values: estimates from the dequantised values alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CodeNoise", "FloatNoise", "StepNoise"]


@dataclass(frozen=True, slots=True)
class FloatNoise:
    """Noise of floats of few bits, whose step grows with the value.

    Values between two powers of two have one step, so the mean of (step / value)^2 there is about half of its largest.

    Args:
        mantissa: Bits of the mantissa without the implied one: 3 for float8 E4M3.
    """

    mantissa: int

    def __call__(self, values: Tensor) -> Tensor:
        """Return the expected square of each value's error."""
        found: Tensor = values.double().square() * (4.0**-self.mantissa / 24)
        return found


@dataclass(frozen=True, slots=True)
class StepNoise:
    """Noise of blocks of whole numbers times a step.

    Args:
        block: Values that share a step; 0: all of them.
        steps: Steps between the smallest and the largest number.
        symmetric: Whether the range is that of the largest magnitude to both sides of zero.
    """

    block: int
    steps: int
    symmetric: bool

    def __call__(self, values: Tensor) -> Tensor:
        """Return the expected square of each value's error."""
        blocks = _blocks(values.double(), self.block)
        if self.symmetric:
            extent = 2 * blocks.abs().amax(1, keepdim=True)
        else:
            extent = blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)
        return ((extent / self.steps).square() / 12).expand_as(blocks).reshape(-1)[: values.numel()]


@dataclass(frozen=True, slots=True)
class CodeNoise:
    """Noise of blocks of values from a table, times a scale.

    Args:
        block: Values that share a scale.
        code: The table, ascending.
    """

    block: int
    code: tuple[float, ...]

    def __call__(self, values: Tensor) -> Tensor:
        """Return the expected square of each value's error."""
        import torch

        blocks = _blocks(values.double(), self.block)
        code = torch.tensor(self.code, dtype=torch.float64)
        scale = blocks.abs().amax(1, keepdim=True) / code.abs().max()
        places = (blocks / scale.clamp_min(1e-300)).contiguous()
        nearest = (torch.searchsorted(code, places - 1e-6)).clamp_(0, len(code) - 1)
        gaps = code.diff()
        left, right = gaps[(nearest - 1).clamp_min(0)], gaps[nearest.clamp_max(len(gaps) - 1)]
        # a value came from half the gap on either side
        square = (left**3 + right**3) / (left + right) / 12
        return (square * scale.square()).reshape(-1)[: values.numel()]


def _blocks(values: Tensor, block: int) -> Tensor:
    """Return the values in rows of a block each, the last one filled up with its last value."""
    import torch

    values = values.reshape(-1)
    block = min(block or values.numel(), values.numel()) or 1
    missing = -values.numel() % block
    if missing:
        values = torch.cat([values, values[-1:].expand(missing)])
    return values.view(-1, block)
