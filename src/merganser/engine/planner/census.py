"""Take the census of a plan: what becomes of every tensor of every input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...anatomy.modules import find_modules
from ...recipe import ModelReference
from ..alignment.alignment import Alignment, Member, is_recomputed
from ..kernels.assignment import untouched
from ..plan.gguf import GgufSummary
from ..plan.sections.census import InputCensus
from ..plan.tensor import PlannedTensor

__all__ = ["take_census"]

NOT_KNOWN = "no tensor of the output is made from it"
"""The reason where none is known; the tests check that no architecture has such tensors."""


def take_census(
    members: Mapping[ModelReference, Member],
    alignment: Alignment,
    tensors: Sequence[PlannedTensor],
    gguf: GgufSummary | None,
) -> dict[ModelReference, InputCensus]:
    """Return for every tensor of every input whether it is merged, copied or left out, and why.

    Args:
        members: The inputs.
        alignment: Which tensors make each tensor of the output.
        tensors: How each tensor of the output is merged.
        gguf: How the output is written as GGUF, with tensors that are copied beside those; None if it is not.
    """
    # ids of TensorInfo objects: models may share files, and a tied head is read from the embedding
    merged: set[int] = set()
    copied: set[int] = set()
    same = untouched().method
    for planned in tensors:
        unchanged = planned.copy or (planned.method is same and _is_copied(planned))
        (copied if unchanged else merged).update(map(id, planned.inputs))
    copied -= merged
    found = {reference: _count(member, alignment, merged, copied) for reference, member in members.items()}
    for reference, member in members.items():
        if gguf is not None and gguf.metadata in member.checkpoint.weight_files:
            own = found[reference]
            left_out = {name: reason for name, reason in own.left_out.items() if name not in gguf.kept}
            kept = len(own.left_out) - len(left_out)
            found[reference] = InputCensus(own.merged, own.copied + kept, left_out)
    return found


def _is_copied(planned: PlannedTensor) -> bool:
    """Return whether a tensor that passthrough takes is not changed, but for its dtype."""
    return len(planned.inputs) == 1 and all(value == 1 for value in planned.parameters.get("scale", ()))


def _count(member: Member, alignment: Alignment, merged: set[int], copied: set[int]) -> InputCensus:
    tensors = member.checkpoint.tensors
    n_merged, n_copied = (sum(map(used.__contains__, map(id, tensors.values()))) for used in (merged, copied))
    left_out = dict(member.checkpoint.left_out)
    if n_merged + n_copied == len(tensors):
        return InputCensus(n_merged, n_copied, left_out)
    offered = {id(tensor) for slot in alignment.slots for tensor in slot.inputs.values()}
    modules = find_modules(member.anatomy) if alignment.modules else {}
    module_of = {name: module for module, names in modules.items() for name in names}
    for name, tensor in tensors.items():
        if id(tensor) in merged or id(tensor) in copied:
            continue
        if not n_merged + n_copied:
            left_out[name] = "only the files beside this model's weights are used"
        elif id(tensor) in offered:
            left_out[name] = "the method takes this tensor from other inputs"
        else:
            left_out[name] = alignment.reasons.get(name) or _why(name, member, alignment, module_of.get(name))
    return InputCensus(n_merged, n_copied, left_out)


def _why(name: str, member: Member, alignment: Alignment, module: str | None) -> str:
    if is_recomputed(name):
        return "model code computes it"
    if module is not None:
        if module not in alignment.modules:
            return "in a module that the output does not have"
        if member.reference not in alignment.modules[module]:
            return f"nothing of this model is merged into its {module}"
    elif alignment.layers is None:
        return NOT_KNOWN
    part = member.anatomy.parts[name]
    if part.layer is not None and (module is not None or part.stack == member.anatomy.main):
        return "its layer is in no slice"
    return "what lies outside the layers comes from the models of the first or last slice"
