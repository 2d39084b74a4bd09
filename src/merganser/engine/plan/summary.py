"""Summarise a plan for display: what is read, how tensors are merged, and what is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .remote import fetched_bytes
from .sections.census import census_entry
from .tensor_groups import TensorGroup, group_tensors, values_of

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint
    from ...recipe import ModelReference
    from ...statistics import CalibrationPlan
    from .plan import Plan

__all__ = [
    "InputSummary",
    "PlanSummary",
    "SidecarSummary",
    "TaskSummary",
    "TensorSummary",
    "count_inputs",
    "summarise",
    "tensor_summaries",
]


@dataclass(frozen=True, slots=True)
class InputSummary:
    """One input of a plan.

    Args:
        used_as: "base", "model", or "files only" if none of its tensors is read.
        reference: Its name in the recipe.
        path: Its folder.
        files: Number of weight files.
        bytes: Size of all its tensors, bytes.
        tensors: Number of its tensors.
        tensors_read: How many of them are read.
        dtypes: Their dtypes, the most common first.
        fetched: Bytes that are fetched from the Hub by ranges in all passes together, at most; 0 if its files are here.
    """

    used_as: str
    reference: str
    path: str
    files: int
    bytes: int
    tensors: int
    tensors_read: int
    dtypes: tuple[str, ...]
    fetched: int = 0


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One tensor of the output: its file, its method, and the value of each of the method's parameters."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: int | None
    role: str
    file: str
    method: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """A model that can be restored from the output.

    Args:
        name: Name of the task.
        model: Its model's name in the recipe.
        bytes: Size of its sidecar files, bytes.
        full_bytes: Size of its tensors in a full checkpoint, bytes.
    """

    name: str
    model: str
    bytes: int
    full_bytes: int


@dataclass(frozen=True, slots=True)
class SidecarSummary:
    """What is stored besides the merged model.

    Args:
        tasks: The models that can be restored.
        shared_bytes: Size of the files shared by all tasks, bytes.
        needs_base: Whether restoring needs the base.
        bytes_read: Bytes read from the inputs and the merged model to make the sidecars.
    """

    tasks: Sequence[TaskSummary]
    shared_bytes: int
    needs_base: bool
    bytes_read: int


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """A plan, summarised for display.

    Args:
        name: Name of the recipe; None if it has none.
        method: Name of the merge method.
        methods: Number of tensors per method: that method first, then others.
        inputs: The inputs; the donor first.
        donor: Model from which config, tensor names and other files are taken.
        side_files: Names of the output's files besides weights, by the model that gives them, or "the recipe".
        files: Sizes in bytes of the weight files that are written, by name.
        dtypes: Dtypes of the output, the most common first.
        tensors: Number of tensors of the output.
        parameters: Number of elements of the output, without copied integers.
        groups: How the tensors are merged.
        passes: Most passes over the inputs of any tensor.
        bytes_read: Bytes of inputs read in all passes together, at most.
        bytes_written: Bytes of weights written.
        peak_memory: Expected largest resident memory, bytes.
        max_memory: Allowed largest resident memory, bytes.
        seconds: Expected time, seconds.
        device: Devices that kernels run on.
        threads: Number of threads that merge.
        fused: Whether kernels are fused.
        seed: Seed of random draws; None if the method makes none.
        warnings: Messages for the user before the run.
        differences: Messages about where mergekit computes other values.
        sidecars: What is stored to restore each model; None if the method has no sidecar.
        vocabulary: Counts of rows that are kept, moved and made, as in the run record; None if rows stay where they are.
        permutation: Units of each model that are moved, as in the run record; None if models are not aligned.
        calibrations: What is measured on data before the merge; its costs are not part of the figures above.
        census: What becomes of the tensors of each input, as in the run record.
    """

    name: str | None
    method: str
    methods: Mapping[str, int]
    inputs: Sequence[InputSummary]
    donor: str
    side_files: Mapping[str, Sequence[str]]
    files: Mapping[str, int]
    dtypes: tuple[str, ...]
    tensors: int
    parameters: int
    groups: Sequence[TensorGroup]
    passes: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    max_memory: int
    seconds: float
    device: str
    threads: int
    fused: bool
    seed: int | None
    warnings: Sequence[str]
    differences: Sequence[str]
    sidecars: SidecarSummary | None = None
    vocabulary: Mapping[str, Any] | None = None
    permutation: Mapping[str, Any] | None = None
    calibrations: Sequence[CalibrationPlan] = ()
    census: Sequence[Mapping[str, Any]] = ()


def summarise(plan: Plan) -> PlanSummary:
    """Return the summary of a plan."""
    return PlanSummary(
        name=plan.recipe.name,
        method=plan.method.name,
        methods={method.name: count for method, count in plan.methods.items()},
        inputs=[_input(plan, reference) for reference in plan.checkpoints],
        donor=str(plan.donor),
        side_files=plan.origins,
        files={shard.name: shard.size for shard in plan.shards},
        dtypes=_most_common(t.stored_as for t in plan.tensors),
        tensors=len(plan.tensors),
        parameters=plan.n_parameters,
        groups=group_tensors(plan),
        passes=plan.passes,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        peak_memory=plan.peak_memory,
        max_memory=plan.max_memory,
        seconds=plan.seconds,
        device=plan.device,
        threads=plan.workers,
        fused=plan.fused,
        seed=plan.seed if plan.method.random else None,
        warnings=list(plan.warnings),
        differences=list(plan.differences),
        sidecars=_sidecars(plan),
        vocabulary=None if plan.vocabulary is None else plan.vocabulary.as_json(),
        permutation=None if plan.permutation is None else plan.permutation.as_json(),
        calibrations=list(plan.calibrations),
        census=[census_entry(str(reference), found) for reference, found in plan.census.items()],
    )


def count_inputs(plan: Plan) -> tuple[bool, int]:
    """Return whether a plan reads a base, and how many other models it merges; some tensors may take fewer."""
    bases = [tensor.base for tensor in plan.tensors if tensor.base is not None]
    files = {base.file for base in bases}
    read = {source.file for tensor in plan.tensors for source in tensor.models} - files
    models = sum(any(file in read for file in found.weight_files) for found in plan.checkpoints.values())
    return bool(bases), max(models, max((len(tensor.models) for tensor in plan.tensors), default=0))


def tensor_summaries(plan: Plan) -> list[TensorSummary]:
    """List every tensor of the output, in the order of its files."""
    return [
        TensorSummary(
            name=t.name,
            dtype=t.stored_as,
            shape=t.shape,
            layer=t.layer,
            role=t.role,
            file=plan.shards[t.shard].name,
            method="" if t.copy else t.method.name,
            parameters=values_of(t),
        )
        for t in plan.tensors
    ]


def _most_common(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name, _ in Counter(names).most_common())


def _sidecars(plan: Plan) -> SidecarSummary | None:
    found = plan.sidecars
    if found is None:
        return None
    tasks = [TaskSummary(task.name, task.model, task.nbytes, task.full_bytes) for task in found.tasks]
    return SidecarSummary(tasks, found.shared_bytes, found.needs_base, found.bytes_read)


def _input(plan: Plan, reference: ModelReference) -> InputSummary:
    checkpoint = plan.checkpoints[reference]
    # by identity, as models of one base with adapters share files
    own = {id(tensor) for tensor in checkpoint.tensors.values()}
    bases = {t.base.name for t in plan.tensors if t.base is not None and id(t.base) in own}
    read = bases | {source.name for t in plan.tensors for source in t.models if id(source) in own}
    return InputSummary(
        used_as="base" if bases else "model" if read else "files only",
        reference=str(reference),
        path=str(checkpoint.path),
        files=len(checkpoint.weight_files),
        bytes=checkpoint.nbytes,
        tensors=len(checkpoint.tensors),
        tensors_read=len(read),
        dtypes=_stored_as(checkpoint),
        fetched=fetched_bytes(plan, reference) if checkpoint.remote else 0,
    )


def _stored_as(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return how values are stored: ways of quantising, then dtypes, the most common first."""
    schemes = checkpoint.quantisation.schemes if checkpoint.quantisation is not None else ()
    plain = ((each.natural or each.dtype).name for each in checkpoint.tensors.values() if each.noise is None)
    return (*schemes, *_most_common(plain))
