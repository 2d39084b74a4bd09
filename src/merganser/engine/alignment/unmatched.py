"""Parts that some models lack or have in another shape: heads with other labels, poolers, prediction layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...errors import CheckpointError
from ...recipe import Recipe
from ...wording import some
from .alignment import Member, may_be_unmatched

__all__ = ["Unmatched", "find_unmatched"]


@dataclass(frozen=True, slots=True)
class Unmatched:
    """What to do with tensors that some models lack or have in another shape.

    Args:
        kept: Names of tensors that are copied from the donor.
        dropped: Names of tensors that the output leaves out.
        warnings: Messages that list both.
    """

    kept: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


def find_unmatched(recipe: Recipe, donor: Member, members: Sequence[Member], names: Iterable[str]) -> Unmatched:
    """Find tensors that some models lack or have in another shape, and decide whether to keep or drop them.

    Args:
        recipe: Its `unmatched` decides.
        donor: Model from which tensors are kept.
        members: All inputs of the merge.
        names: Names of all tensors to compare, of the donor and of the other models.

    Raises:
        CheckpointError: A layer or an embedding is among them.
    """
    if recipe.unmatched == "refuse":
        return Unmatched()
    differing = [name for name in names if not _is_alike(name, members)]
    for name in differing:
        holder = next(member for member in [donor, *members] if name in member.anatomy.parts)
        if not may_be_unmatched(name, holder):
            shapes = ", ".join(f"{_shape(name, member)} in {member.reference}" for member in members)
            raise CheckpointError(
                f"{name}: {shapes}; 'unmatched: {recipe.unmatched}' is only for tensors after the layers; models that "
                "differ in layers or embeddings are of different architectures"
            )
    held = {name for name in differing if name in donor.checkpoint.tensors}
    kept = held if recipe.unmatched == "base" else set()
    warnings = []
    if kept:
        warnings.append(f"not in all models with the same shape, taken from {donor.reference}: {some(sorted(kept))}")
    if dropped := set(differing) - kept:
        needed = "; a class that needs them initialises them randomly" if held and not kept else ""
        warnings.append(f"not in all models with the same shape, left out: {some(sorted(dropped))}{needed}")
    return Unmatched(frozenset(kept), frozenset(dropped), tuple(warnings))


def _is_alike(name: str, members: Sequence[Member]) -> bool:
    held = [member.tensor(name) for member in members]
    return all(held) and len({(tensor.shape, tensor.dtype.kind) for tensor in held if tensor}) == 1


def _shape(name: str, member: Member) -> str:
    tensor = member.tensor(name)
    return "missing" if tensor is None else str(list(tensor.shape))
