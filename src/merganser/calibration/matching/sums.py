"""Correlations of units of two models, and where in a block their features are seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...anatomy import infer_anatomy
from ...anatomy.symmetry import Units, Use, find_units
from ..forward import internals
from ..forward.skeleton import Block, Skeleton

__all__ = ["Correlation", "Feature", "features", "units_of"]

# a feature whose variance is below this share of its squared mean is constant, up to the rounding of float32
_CONSTANT = 1e-13
# units whose products with all that follow are computed at once, where units are compared with themselves
_PANEL = 512


@dataclass(frozen=True)
class Feature:
    """The features of a group of units: what a matrix receives.

    Args:
        units: Name of the group.
        tensor: The tensor of the checkpoint that receives them.
        size: Number of units.
        start: The first feature of the first unit.
        width: Number of features of a unit.
    """

    units: str
    tensor: str
    size: int
    start: int
    width: int


def units_of(skeleton: Skeleton, kinds: Sequence[str]) -> list[Units]:
    """Return the permutable units of a model, of these kinds.

    Raises:
        UnsupportedError: It is not known which permutations leave the model's output unchanged.
    """
    shapes = {name: tensor.shape for name, tensor in skeleton.checkpoint.tensors.items()}
    config = skeleton.checkpoint.config
    return [each for each in find_units(shapes, config, infer_anatomy(shapes, config)) if each.kind in kinds]


def features(skeleton: Skeleton, block: Block, units: Sequence[Units]) -> dict[str, Feature]:
    """Return where a block shows the features of units, by the parameter that receives them.

    Hidden units are seen where the down projection receives them, heads where the output projection does, and channels of
    the residual stream where a matrix reads them, behind the norm.
    """
    held: dict[tuple[str, int], tuple[Units, Use]] = {}
    for one in [one for group in units for one in (group, group.inner) if one is not None]:
        held |= {(use.tensor, use.axis): (one, use) for use in one.uses}
    axes = internals.linear_classes()
    names = {skeleton.targets[source].parameter: source for source in block.sources}
    found: dict[str, Feature] = {}
    for name, module in block.module.named_modules():
        parameter = f"{block.name}.{name}.weight"
        axis = next((axis for kind, axis in axes.items() if isinstance(module, kind)), None)
        own = None if axis is None or parameter not in names else held.get((names[parameter], axis))
        if own is not None:
            one, use = own
            found[parameter] = Feature(one.name, use.tensor, one.size, use.start, use.width)
    return found


class Correlation:
    """Pearson correlations of every unit of one model with every unit of another, over the same tokens.

    Sums are of what is left after the mean of the first tokens is taken away, so that a large mean costs no precision.
    Products are float32, and sums over batches float64.

    Args:
        feature: The features.
    """

    def __init__(self, feature: Feature) -> None:
        self._feature = feature
        self.size = feature.size
        n, width = feature.size, feature.width
        self._count = 0
        self._half = False
        self._shifts: list[Tensor] = []
        self._sums = torch.zeros(2, width, n, dtype=torch.float64)
        self._squares = torch.zeros(2, width, n, dtype=torch.float64)
        self._products = torch.zeros(width, n, n, dtype=torch.float64)

    @staticmethod
    def memory_of(feature: Feature) -> int:
        """Return the bytes of the sums, and of one product."""
        return 12 * feature.width * feature.size**2

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Add some tokens: what the matrix receives in both models, shape [tokens, features]."""
        rows = [self._rows(each) for each in (ours, theirs)]
        if not self._shifts:
            self._shifts = [each.mean(1, keepdim=True) for each in rows]
        first, second = (each - shift for each, shift in zip(rows, self._shifts, strict=True))
        self._count += first.shape[1]
        self._sums += torch.stack([first.sum(1), second.sum(1)])
        self._squares += torch.stack([first.square().sum(1), second.square().sum(1)])
        self._products += first.transpose(1, 2) @ second

    def add_own(self, rows: Tensor) -> None:
        """Add some tokens where the units are compared with themselves: what the matrix receives, shape [tokens, features].

        Each product of two units is computed once. Not to be mixed with `add`.
        """
        given = self._rows(rows)
        if not self._shifts:
            self._shifts = [given.mean(1, keepdim=True)] * 2
        given = given - self._shifts[0]
        self._count += given.shape[1]
        self._sums += given.sum(1)
        self._squares += given.square().sum(1)
        turned = given.transpose(1, 2)
        for start in range(0, self.size, _PANEL):
            self._products[:, start : start + _PANEL, start:] += turned[:, start : start + _PANEL] @ given[:, :, start:]
        self._half = True

    def _mirror(self) -> None:
        """Fill in the products that `add_own` left out."""
        for start in range(0, self.size, _PANEL):
            right = self._products[:, start : start + _PANEL, start + _PANEL :]
            self._products[:, start + _PANEL :, start : start + _PANEL] = right.transpose(1, 2)
        self._half = False

    def _rows(self, rows: Tensor) -> Tensor:
        """Return the features of a batch, float32, shape [width, tokens, units]."""
        own = self._feature
        chosen = rows[:, own.start : own.start + own.size * own.width].float()
        return chosen.reshape(len(rows), own.size, own.width).permute(2, 0, 1)

    def result(self) -> Tensor:
        """Return the correlations, summed over the features of a unit, float32, shape [size, size].

        A feature that is the same for all tokens has the correlation 0 with every other.
        """
        if self._half:
            self._mirror()
        count = max(self._count, 1)
        mean = self._sums / count
        variance = self._squares / count - mean.square()
        shifts = torch.stack([each.squeeze(1) for each in self._shifts]).double() if self._shifts else mean
        varies = variance > _CONSTANT * (mean + shifts).square()
        scale = torch.where(varies, variance.clamp(min=1e-300).rsqrt(), 0.0)
        found = self._products.div_(count).sub_(mean[0].unsqueeze(2) * mean[1].unsqueeze(1))
        return found.mul_(scale[0].unsqueeze(2)).mul_(scale[1].unsqueeze(1)).sum(0).float()
