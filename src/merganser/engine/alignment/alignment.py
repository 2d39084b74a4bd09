"""Match the tensors of the inputs: which tensors of which models are merged into each tensor of the output.

Works from names and shapes. No table of architectures is needed; structure matters only for slices, layer schedules
and tied heads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ...anatomy import Anatomy, Part, infer_anatomy, is_tied
from ...checkpoint import Checkpoint, TensorInfo
from ...errors import CheckpointError
from ...method import Location
from ...recipe import ModelReference, Recipe
from ...wording import some

# buffers that old checkpoints store and that the model's code recomputes
_RECOMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|(^|\.)h\.\d+\.attn(\.attention)?\.bias|position_ids)$")
_ENDS = ("inv_freq", "bias", "position_ids")


def is_recomputed(name: str) -> bool:
    """Return whether a tensor is a buffer that the model's code computes again."""
    # most names have another ending, and this check is faster than the pattern
    return name.endswith(_ENDS) and _RECOMPUTED.search(name) is not None


@dataclass(frozen=True, eq=False)
class Member:
    """An opened checkpoint of the recipe, with the structure inferred from its tensor names."""

    reference: ModelReference
    checkpoint: Checkpoint
    anatomy: Anatomy
    tied: bool

    @classmethod
    def of(cls, reference: ModelReference, checkpoint: Checkpoint, others: Iterable[Member] = ()) -> Member:
        """Infer a checkpoint's structure, or reuse that of one of `others` with the same names, shapes and config."""
        shapes = checkpoint.shapes
        for other in others:
            if other.checkpoint.config == checkpoint.config and other.checkpoint.shapes == shapes:
                return cls(reference, checkpoint, other.anatomy, other.tied)
        anatomy = infer_anatomy(shapes, checkpoint.config)
        tied = is_tied(checkpoint.config)
        return cls(reference, checkpoint, anatomy, bool(anatomy.tied) if tied is None else tied)

    @cached_property
    def layers(self) -> dict[int, dict[str, str]]:
        """Tensor names of the main stack, by layer, then by the part of the name after the layer's number."""
        grouped: dict[int, dict[str, str]] = {}
        for name, part in self.anatomy.parts.items():
            if part.stack == self.anatomy.main and part.layer is not None:
                grouped.setdefault(part.layer, {})[name[len(f"{part.stack}.{part.layer}.") :]] = name
        return grouped

    def tensor(self, name: str) -> TensorInfo | None:
        """Return a tensor by name, or None; for a tied head that is not stored, return the embedding."""
        found = self.checkpoint.tensors.get(name)
        if found is None:
            source = dict(self.anatomy.tied).get(name)
            if source is None and self.tied and self.anatomy.head is None and _is_head(name):
                source = self.anatomy.embedding
            if source is not None:
                found = self.checkpoint.tensors[source]
        return found


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the output and the tensors of the inputs that it is made from.

    Args:
        name: Name in the output.
        rule: Name that parameter filters match (the embedding's name for a tied head).
        part: Structure of the name (layer, role, ...), with the output's layer numbers.
        slice_index: Index of the slice whose parameters apply.
        t: Position in a layer schedule, 0 to 1.
        location: Its location in the output (the embedding's for a tied head).
        inputs: The tensor of each model of the slice.
        kept: True if it is not merged but copied from the only model in `inputs`.
    """

    name: str
    rule: str
    part: Part
    slice_index: int
    t: float
    location: Location
    inputs: Mapping[ModelReference, TensorInfo]
    kept: bool = False


@dataclass(frozen=True, slots=True)
class Alignment:
    """All slots, in the order of the output.

    Args:
        slots: One per tensor of the output.
        tied: Whether the output's head shares its embedding.
        layers: For slices, the donor's layer whose config settings each output layer gets; else None.
        warnings: Messages about tensors that were dropped and choices that were made.
        left_out: Names of tensors that the recipe's `unmatched` leaves out.
        reasons: Tensors of the inputs that the output does not have, and why, by name.
        other_layers: The same as `layers` for modules other than the language model (a tower, encoder, decoder).
        modules: Where the models were aligned by modules: for each, the models that it is made from; else empty.
        partial: Models that do not have the same modules as the donor: the language model alone, or other towers.
    """

    slots: list[Slot]
    tied: bool
    layers: list[int] | None
    warnings: list[str]
    left_out: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)
    other_layers: Mapping[str, list[int]] = field(default_factory=dict)
    modules: Mapping[str, frozenset[ModelReference]] = field(default_factory=dict)
    partial: frozenset[ModelReference] = frozenset()


def after_layers(recipe: Recipe) -> float:
    """Return the position in layer schedules of tensors after the layers: 1, or 0 as in mergekit."""
    return 0.0 if recipe.compat == "mergekit" else 1.0


def location_of(name: str, anatomy: Anatomy) -> Location:
    """Return the location of a tensor in its checkpoint: position, layer and role."""
    part = anatomy.parts[name]
    return Location(part.position, part.layer, anatomy.layer_count(name), part.role)


def inputs_of(name: str, sources: Collection[tuple[Member, str]]) -> dict[ModelReference, TensorInfo]:
    """Look up one tensor in every model, by its name there; refuse different shapes or kinds of dtype."""
    found: dict[ModelReference, TensorInfo] = {}
    for member, own in sources:
        tensor = member.checkpoint.tensors.get(own) or member.tensor(own)
        if tensor is None:
            raise CheckpointError(f"{member.reference}: tensor {own!r} is missing; the other models have it")
        found[member.reference] = tensor
    (first, expected), *rest = found.items()
    for reference, tensor in rest:
        if tensor.shape == expected.shape and tensor.dtype is expected.dtype:
            continue
        if tensor.shape != expected.shape:
            raise CheckpointError(_shape_message(name, first, expected, reference, tensor, sources))
        if (tensor.dtype.kind == "float") is not (expected.dtype.kind == "float"):
            raise CheckpointError(
                f"{name}: {first} holds {expected.dtype.name}, {reference} holds {tensor.dtype.name}; "
                "numbers and integer buffers cannot be merged with each other"
            )
        if expected.dtype.kind != "float" and tensor.dtype != expected.dtype:
            raise CheckpointError(
                f"{name}: {first} holds {expected.dtype.name}, {reference} holds {tensor.dtype.name}; "
                "buffers of whole numbers are copied when they are equal, dtype included"
            )
    return found


def _shape_message(
    name: str,
    first: ModelReference,
    expected: TensorInfo,
    other: ModelReference,
    tensor: TensorInfo,
    sources: Collection[tuple[Member, str]],
) -> str:
    shapes = f"{list(expected.shape)} in {first}, {list(tensor.shape)} in {other}"
    part = next(member for member, _ in sources if member.reference == other).anatomy.parts.get(tensor.name)
    rows = {member.anatomy.vocab_size for member, _ in sources}
    if part is not None and part.role == "head" and not {expected.shape[0], tensor.shape[0]} <= rows:
        return (
            f"{name}: heads differ: {shapes}. They have other labels, so they cannot be merged; to merge the rest, write "
            "'unmatched: skip' (leave them out) or 'unmatched: base' (keep the base's) into the recipe"
        )
    if part is not None and part.role in ("embedding", "head") and tensor.shape[1:] == expected.shape[1:]:
        return (
            f"{name}: vocabularies differ: {shapes}. Models are merged row by row, so both must have the same "
            "tokenizer; 'tokenizer_source: base' or 'tokenizer_source: union' in the recipe matches rows by token"
        )
    return f"{name}: shapes differ: {shapes}. Only models of one architecture and size can be merged"


def _head_name(members: Iterable[Member]) -> str | None:
    return next((m.anatomy.head for m in members if m.anatomy.head in m.checkpoint.tensors), None)


def _is_head(name: str) -> bool:
    return name.endswith(("lm_head.weight", "embed_out.weight", "output.weight"))


def output_names(
    donor: Member, members: Sequence[Member], warnings: list[str]
) -> tuple[list[str], str | None, bool, dict[str, str]]:
    """Decide which tensors the output has.

    Returns:
        Their names in the donor's order, the head's name, whether the head is tied, and the names left out with reasons.
    """
    names = list(donor.checkpoint.tensors)
    everyone = list(dict.fromkeys([donor, *members]))
    tied = all(member.tied for member in members)
    head = _head_name(everyone)
    if head and head not in donor.checkpoint.tensors and not tied:
        names.append(head)
        untied = [str(m.reference) for m in members if not m.tied]
        warnings.append(f"{head}: {', '.join(untied)} has its own head, so the output also has one and is not tied")
    drop = _droppable(head, tied, everyone, warnings)
    drop |= _copies(donor, members, head, warnings)
    return [name for name in names if name not in drop], head, tied, drop


def _droppable(head: str | None, tied: bool, members: Sequence[Member], warnings: list[str]) -> dict[str, str]:
    """Return names that some models store and the output does not need: recomputed buffers and copies of tied heads."""
    names = dict.fromkeys(name for m in members for name in m.checkpoint.tensors)
    computed = [name for name in names if is_recomputed(name) and not _alike(name, members)]
    drop = dict.fromkeys(computed, "model code computes it")
    if drop:
        warnings.append(f"{some(sorted(drop))}: not the same in every model; left out, since model code computes them")
    if tied and head and any(head not in m.checkpoint.tensors for m in members):
        drop[head] = "a copy of the embedding, to which the head is tied"
        warnings.append(f"{head}: every model is tied, so the copy that some of them hold is left out")
    return drop


def _copies(donor: Member, members: Sequence[Member], head: str | None, warnings: list[str]) -> dict[str, str]:
    """Return names under which models store copies of a tensor that the donor stores once (T5's shared embedding)."""
    once = dict(donor.anatomy.tied)
    held = dict.fromkeys(name for member in members for name in member.checkpoint.tensors)
    copies = [name for name in held if name in once and name != head and name not in donor.checkpoint.tensors]
    if copies:
        sources = ", ".join(dict.fromkeys(once[name] for name in copies))
        warnings.append(
            f"{some(copies)}: copies of {sources}, which some models hold and the output needs once; left out"
        )
    return {name: f"a copy of {once[name]}" for name in copies}


def _alike(name: str, members: Sequence[Member]) -> bool:
    """Return whether every model has the tensor, with the same shape and dtype."""
    held = (member.checkpoint.tensors.get(name) for member in members)
    return len({tensor and (tensor.shape, tensor.dtype) for tensor in held}) == 1


def check_names(
    donor: Member, member: Member, names: Sequence[str], own: set[str], renamed: Mapping[str, str] | None = None
) -> None:
    """Raise CheckpointError if a model lacks tensors of the output, or has others.

    Args:
        donor: Model that defines the names; for the donor itself, another model that has them.
        member: The model.
        names: Names of the output's tensors.
        own: Names of the model's tensors.
        renamed: The model's name for a tensor of the output, where the two names differ.
    """
    if not renamed and own == set(names):
        return
    missing = sorted(name for name in names if member.tensor((renamed or {}).get(name, name)) is None)
    extra = sorted(own.difference(names))
    if missing or extra:
        lines = [f"{member.reference} and {donor.reference} do not hold the same tensors"]
        if missing:
            lines.append(f"{len(missing)} missing in {member.reference}: {some(missing)}")
        if extra:
            lines.append(f"{len(extra)} only in {member.reference}: {some(extra)}")
        lines.append("only models of one architecture can be merged")
        kind = donor.checkpoint.config.get("model_type")
        if (
            kind
            and kind == member.checkpoint.config.get("model_type")
            and 2 * min(len(missing), len(extra)) > len(names)
        ):
            lines.append(
                f"both are {kind}, so one was saved by other code: save it again with the code that wrote the other"
            )
        # a third model may be the only one that has a name
        holders = [
            (name, next((m for m in (donor, member) if name in m.anatomy.parts), None)) for name in missing + extra
        ]
        if all(holder is not None and may_be_unmatched(name, holder) for name, holder in holders):
            lines.append(
                "these follow the layers: 'unmatched: skip' or 'unmatched: base' in the recipe merges the rest"
            )
        raise CheckpointError("; ".join(lines))


def may_be_unmatched(name: str, holder: Member) -> bool:
    """Return whether a tensor comes after the layers, where models of one architecture may differ (heads, poolers)."""
    anatomy = holder.anatomy
    part = anatomy.parts[name]
    if part.role == "norm":
        # a norm in the same module as the layers is the trunk's final norm; heads have theirs elsewhere
        stacks = [anatomy.main] if anatomy.main is not None else list(anatomy.stacks)
        if name.rsplit(".", 2)[0] in {stack.rpartition(".")[0] for stack in stacks}:
            return False
    return part.position == "after" and part.role != "embedding" and name != anatomy.embedding


def anatomy_with(name: str, members: Iterable[Member]) -> Anatomy:
    """Return the anatomy of the first model that has a tensor of this name."""
    return next(m.anatomy for m in members if name in m.anatomy.parts)
