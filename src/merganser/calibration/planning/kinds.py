"""What a calibration measures and takes, by the kind of inputs that its statistics are of (`merganser.method.FromData`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...method import DataInputs
from ..forward.skeleton import Skeleton
from ..learning import learnt_coefficients
from ..sums.coefficients import COEFFICIENTS
from ..sums.taps import Tapped
from ..within.fitting import planned_coefficients
from ..within.pairs import CROSS_GRAM, planned_pairs
from ..within.zipping import GROUPS, planned_groups
from .mode import Mode

__all__ = ["KINDS", "Kind"]

Blocks = list[list[Tapped]]


def _as_they_are(skeleton: Skeleton, sums: Blocks, mode: Mode) -> Blocks:
    return sums


def _pairs(skeleton: Skeleton, sums: Blocks, mode: Mode) -> Blocks:
    return [planned_pairs(skeleton, block) for block in sums]


def _fitted(skeleton: Skeleton, sums: Blocks, mode: Mode) -> Blocks:
    return [planned_coefficients(skeleton, block) for block in skeleton.blocks]


def _learnt(skeleton: Skeleton, sums: Blocks, mode: Mode) -> Blocks:
    assert mode.descent is not None
    return learnt_coefficients(skeleton, mode.descent)


def _groups(skeleton: Skeleton, sums: Blocks, mode: Mode) -> Blocks:
    return [planned_groups(skeleton, block) for block in skeleton.blocks]


@dataclass(frozen=True, slots=True)
class Kind:
    """How one kind of inputs is planned.

    Args:
        measured: The statistic that is measured in place of sums over a model's own inputs, or beside them; None for none.
        planned: Returns the sums of every block, without values, given those over the inputs of its matrices.
        forwards: How often the data pass through all blocks. Within a merge they pass through the merged blocks, too, and
            through the models' own to be compared with.
        held: Returns how many times weights are in memory, those outside the blocks and those of one block, given the
            number of models that are measured together, and the bytes of an entry.
        sums_of_all: Whether the sums of all models are in memory at once.
    """

    measured: str | None
    planned: Callable[[Skeleton, Blocks, Mode], Blocks]
    forwards: float
    held: Callable[[int, int], tuple[float, float]]
    sums_of_all: bool = False

    def statistics(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of all statistics that are measured, given those of sums."""
        return (*names, *([] if self.measured is None else [self.measured]))


KINDS: Mapping[DataInputs, Kind] = {
    "own": Kind(None, _as_they_are, 1, lambda models, entry: (1, 1)),
    "prefix": Kind(None, _as_they_are, 2, lambda models, entry: (1, 2)),
    "merged": Kind(CROSS_GRAM, _pairs, 3, lambda models, entry: (2, 3)),
    # the block's base, task vectors and gradient are held in float32, too
    "fitted": Kind(COEFFICIENTS, _fitted, 3, lambda models, entry: (2, 2 + (models + 3) * 4 / entry)),
    "mean": Kind(CROSS_GRAM, _pairs, 1, lambda models, entry: (models, models), sums_of_all=True),
    "zipped": Kind(GROUPS, _groups, 1, lambda models, entry: (models, models)),
    # what learning takes is planned with its steps (`learning/plan.py`)
    "end_to_end": Kind(COEFFICIENTS, _learnt, 1, lambda models, entry: (1, 1)),
}
