"""The units of work: groups of tensors, and the tasks into which they are divided."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan.plan import Plan
from ..plan.tensor import PlannedTensor

SEGMENT_BLOCKS = 16
BUNDLE_TENSORS = 512


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are merged together.

    Args:
        index: Position in the plan's order.
        tensors: One large or encoded tensor, or a bundle of small ones that are adjacent in the output.
        segments: Ranges of blocks of the large tensor, one per task; a bundle has one task.
        bundle: Whether these are small tensors, of one block each.
    """

    index: int
    tensors: tuple[PlannedTensor, ...]
    segments: tuple[tuple[int, int], ...]
    bundle: bool


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """One segment of one group in one pass.

    Args:
        group: Index of the group.
        pass_number: Number of the pass, from 0; the last one combines. -1: all passes in one task.
        segment: Index of the segment.
    """

    group: int
    pass_number: int
    segment: int


def make_groups(plan: Plan) -> list[Group]:
    """Divide the plan's tensors into groups."""
    groups: list[Group] = []
    bundle: list[PlannedTensor] = []
    filled = 0

    def close() -> None:
        nonlocal filled
        if bundle:
            groups.append(Group(len(groups), tuple(bundle), ((0, 1),), bundle=True))
            bundle.clear()
            filled = 0

    for tensor in plan.tensors:
        blocks = 1 if tensor.copy or tensor.in_one_block else -(-tensor.size // tensor.block)
        if blocks > 1 or tensor.is_encoded:
            close()
            cuts = tuple((a, min(a + SEGMENT_BLOCKS, blocks)) for a in range(0, blocks, SEGMENT_BLOCKS))
            groups.append(Group(len(groups), (tensor,), cuts, bundle=False))
            continue
        if bundle and (
            filled + tensor.size > plan.block
            or len(bundle) >= BUNDLE_TENSORS
            or bundle[-1].shard != tensor.shard
            or bundle[-1].offset + bundle[-1].nbytes != tensor.offset
            or bundle[-1].method is not tensor.method
        ):
            close()
        bundle.append(tensor)
        filled += tensor.size
    close()
    return groups
