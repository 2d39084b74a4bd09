"""Summarise a plan for display: what is read, how tensors are merged, and what is written."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .remote import fetched_bytes
from .sections.census import census_entry

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint
    from ...recipe import ModelReference
    from ...statistics import CalibrationPlan
    from .plan import Plan
    from .tensor import PlannedTensor

__all__ = [
    "InputSummary",
    "PlanSummary",
    "SidecarSummary",
    "TaskSummary",
    "TensorGroup",
    "TensorSummary",
    "count_inputs",
    "summarise",
    "tensor_summaries",
    "value_text",
]

_MOST_POINTS = 6
_ROLE_ORDER = ("embedding", "position", "norm", "attention", "ssm", "conv", "mlp", "router", "expert", "other", "head")


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
class TensorGroup:
    """Tensors of the output that are merged by the same method with the same parameters.

    Args:
        layers: First and last layer; None for tensors outside the layers.
        roles: Their roles ("attention", "norm", ...); empty if the group has all roles in these layers.
        names: Their names, with `*` for the layer, if role and layers do not identify the group.
        tensors: Number of tensors.
        method: Method that merges them; empty if they are copied.
        parameters: Its parameters, and the numbers it derives from a tensor's location, as text; a schedule by its turns.
        copied: Whether they are integers, copied from equal inputs.
    """

    layers: tuple[int, int] | None
    roles: tuple[str, ...]
    names: tuple[str, ...]
    tensors: int
    method: str
    parameters: Mapping[str, str]
    copied: bool


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
        groups=_groups(plan),
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
            parameters=_values(t),
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


def _groups(plan: Plan) -> list[TensorGroup]:
    """Group tensors that have the same method and the same parameters in every layer."""
    merged = [t for t in plan.tensors if not t.copy]
    groups = []
    if merged and all(_way(t) == _way(merged[0]) for t in merged):
        groups.append(_group(merged, (), ()))
    else:
        groups += _differing(merged)
    copied = len(plan.tensors) - len(merged)
    if copied:
        groups.append(
            TensorGroup(layers=None, roles=(), names=(), tensors=copied, method="", parameters={}, copied=True)
        )
    return groups


def _differing(merged: Sequence[PlannedTensor]) -> list[TensorGroup]:
    # tensors of one kind, such as all q_proj, made from equally many models, form a series over the layers
    kinds: dict[tuple[str, str, int], list[PlannedTensor]] = defaultdict(list)
    for tensor in merged:
        kinds[_pattern(tensor), tensor.role, len(tensor.models)].append(tensor)
    alike: dict[tuple[Any, ...], dict[tuple[str, str], list[PlannedTensor]]] = defaultdict(dict)
    for (pattern, role, _), members in kinds.items():
        alike[_series(members)].setdefault((pattern, role), []).extend(members)
    roles_in: dict[str, set[str]] = defaultdict(set)
    ways: Counter[tuple[str, str]] = Counter()
    for (where, *_), held in alike.items():
        roles = {role for _, role in held}
        roles_in[where] |= roles
        ways.update((where, role) for role in roles)
    found = []
    for (where, *_), held in alike.items():
        roles = {role for _, role in held}
        names = tuple(sorted(pattern for pattern, role in held if ways[where, role] > 1))
        everything = where == "layers" and roles == roles_in[where] and not names
        members = [tensor for each in held.values() for tensor in each]
        found.append(_group(members, () if everything else tuple(sorted(roles, key=_ROLE_ORDER.index)), names))
    return sorted(found, key=_position)


def _series(members: Sequence[PlannedTensor]) -> tuple[Any, ...]:
    """Return the key by which kinds of tensors share a group: method and parameters, per layer where they vary."""
    where = "outside" if members[0].layer is None else "layers"
    values = {t.layer: _way(t) for t in members}
    first, *rest = values.values()
    return (where, first) if all(value == first for value in rest) else (where, tuple(sorted(values.items())))


def _way(tensor: PlannedTensor) -> tuple[Any, ...]:
    return (tensor.method.name, *_values(tensor).items())


def _values(tensor: PlannedTensor) -> dict[str, Any]:
    return {**tensor.parameters, **tensor.located}


def _position(group: TensorGroup) -> tuple[Any, ...]:
    """Return the sort key of a group: before the layers, the layers, after the layers."""
    first = _ROLE_ORDER.index(group.roles[0]) if group.roles else -1
    if group.layers is not None:
        return (1, group.layers, first, group.names)
    return (0 if group.roles and group.roles[0] in ("embedding", "position") else 2, (0, 0), first, group.names)


def _pattern(tensor: PlannedTensor) -> str:
    """Return the tensor's name with `*` for its layer's number."""
    if tensor.layer is None:
        return tensor.name
    return f".{tensor.name}".replace(f".{tensor.layer}.", ".*.", 1)[1:]


def _group(members: Sequence[PlannedTensor], roles: tuple[str, ...], names: tuple[str, ...]) -> TensorGroup:
    layers = sorted({t.layer for t in members if t.layer is not None})
    inside = bool(layers) and all(t.layer is not None for t in members)
    by_depth = sorted(members, key=lambda t: -1 if t.layer is None else t.layer)
    parameters = {}
    for name, value in _values(members[0]).items():
        series = [_values(t)[name] for t in by_depth]
        if isinstance(value, tuple):
            texts = [value_text(column) for column in zip(*series, strict=True)]
            same = len(set(texts)) == 1
            parameters[name] = (f"{texts[0]} each" if len(texts) > 1 else texts[0]) if same else ", ".join(texts)
        else:
            parameters[name] = value_text(series)
    span = (layers[0], layers[-1]) if inside else None
    return TensorGroup(
        layers=span,
        roles=roles,
        names=names,
        tensors=len(members),
        method=members[0].method.name,
        parameters=parameters,
        copied=False,
    )


def value_text(values: Sequence[Any]) -> str:
    """Describe the values that a parameter takes from the first layer to the last: `0.2 → 0.8`.

    Numbers are shown by their turning points, other values by their changes, long series by their extremes.
    """
    steps = [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in steps)
    if numbers:
        steps = [
            v for i, v in enumerate(steps) if i in (0, len(steps) - 1) or (v - steps[i - 1]) * (steps[i + 1] - v) < 0
        ]
    if len(steps) <= _MOST_POINTS:
        return " → ".join(map(_shown, steps))
    if numbers:
        return f"between {_shown(min(steps))} and {_shown(max(steps))}"
    return " or ".join(sorted({_shown(step) for step in steps}))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)
