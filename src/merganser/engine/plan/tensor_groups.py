"""Group the tensors of a plan by how they are merged, and say which values their parameters take along the depth."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import Plan
    from .tensor import PlannedTensor

__all__ = ["TensorGroup", "group_tensors", "value_text", "values_of"]

_MOST_POINTS = 6
_ROLE_ORDER = ("embedding", "position", "norm", "attention", "ssm", "conv", "mlp", "router", "expert", "other", "head")


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


def group_tensors(plan: Plan) -> list[TensorGroup]:
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
    return (tensor.method.name, *values_of(tensor).items())


def values_of(tensor: PlannedTensor) -> dict[str, Any]:
    """Return the parameters of a tensor, also those that follow from where it is."""
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
    for name, value in values_of(members[0]).items():
        series = [values_of(t)[name] for t in by_depth]
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
