"""The experts of mixtures, whose order does not matter as long as the router's rows follow; from names and shapes alone.

A router gives each expert a score from a row of its own, and a layer adds up what the chosen experts compute. So the
experts of a layer may be put into any order together with these rows. Where the router chooses among groups of experts
first (`n_group`), groups may change places, and experts within a group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .settings.config import as_int
from .settings.mixtures import number_of_experts

__all__ = ["EXPERTS", "ROUTERS", "SHARED", "ExpertUnits", "common_size", "find_experts", "sizes_of_layers"]

EXPERTS = "experts"
"""The kind of these units, beside those of `symmetry.UNITS`."""

_SINGLE = re.compile(r"^(?P<home>.+)\.experts\.(?P<number>\d+)\.(?P<leaf>.+)$")
_PACKED = re.compile(r"^(?P<home>.+)\.experts\.(?P<leaf>[^.\d].*)$")
_GRANITE = re.compile(r"^(?P<home>.+\.block_sparse_moe)\.(?P<leaf>(?:input|output)_linear\.weight)$")
"""Packed experts as Granite names them."""

ROUTERS = ("gate", "router", "e_score_correction_bias", "expert_bias", "moe_statics")
"""What comes first in the names of a router's tensors, within the module that holds router and experts."""

SHARED = "shared_"
"""Tensors of experts that compute every token, which keep their place."""


@dataclass(frozen=True, slots=True)
class ExpertUnits:
    """The experts of one layer.

    Attributes:
        name: A name: the module that holds router and experts, and the kind.
        size: Number of experts.
        parts: Number of groups that the router chooses among first; 1 if it chooses among all.
        single: For each tensor of an expert, its names, one per expert; empty if the checkpoint packs them.
        packed: Tensors with all experts along their first axis; empty if there is a tensor per expert.
        router: Tensors of the router, with an expert along their first axis; the weight comes first.
    """

    name: str
    size: int
    parts: int
    single: tuple[tuple[str, ...], ...]
    packed: tuple[str, ...]
    router: tuple[str, ...]

    @property
    def tensors(self) -> list[str]:
        """The names of all tensors that hold experts."""
        return [*(name for names in self.single for name in names), *self.packed, *self.router]


@dataclass
class _Found:
    """What the names say of one layer."""

    single: dict[int, dict[str, str]] = field(default_factory=dict)
    packed: list[str] = field(default_factory=list)
    router: list[str] = field(default_factory=list)


def find_experts(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[ExpertUnits]:
    """Return the layers of experts of a mixture, in the order of their names.

    Args:
        shapes: Every tensor name and its shape.
        config: The contents of config.json.

    Raises:
        CheckpointError: Experts, or rows of a router, are missing, or experts have different shapes.
        UnsupportedError: The model has no experts, or holds something beside them that is not known.
    """
    layers: dict[str, _Found] = {}
    for name in shapes:
        match = _SINGLE.match(name)
        if match is not None:
            own = layers.setdefault(match["home"], _Found())
            own.single.setdefault(int(match["number"]), {})[match["leaf"]] = name
        elif (match := _PACKED.match(name) or _GRANITE.match(name)) is not None:
            layers.setdefault(match["home"], _Found()).packed.append(name)
    if not layers:
        raise UnsupportedError("it has no experts (no tensors '.experts.'), so there are none to be matched")
    for name in sorted(shapes):
        home = next((home for home in layers if name.startswith(f"{home}.")), None)
        inside = home is None or name.startswith((f"{home}.experts.", f"{home}.{SHARED}")) or _GRANITE.match(name)
        if home is not None and not inside:
            if name[len(home) + 1 :].partition(".")[0] not in ROUTERS:
                raise UnsupportedError(
                    f"{name} (shape {list(shapes[name])}): it is not known what this tensor beside the experts holds, so "
                    "their order cannot be changed"
                )
            layers[home].router.append(name)
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    count = number_of_experts(config)
    parts = as_int(text.get("n_group")) or 1
    return [_units(home, found, shapes, count, parts) for home, found in sorted(layers.items())]


def common_size(sizes: Iterable[int], where: str) -> int:
    """Return the number of experts that every layer has.

    Args:
        sizes: The number of each layer; at least one.
        where: The model, for the message.

    Raises:
        UnsupportedError: Layers differ.
    """
    found = sorted({*sizes})
    if len(found) > 1:
        raise UnsupportedError(f"{where}: its layers have {found[0]} to {found[-1]} experts; they must be alike")
    return found[0]


def sizes_of_layers(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[int]:
    """Return how many experts the layers of a checkpoint hold, in any order.

    Args:
        shapes: Every tensor name and its shape.
    """
    single: dict[str, set[int]] = {}
    found: set[int] = set()
    for name, shape in shapes.items():
        match = _SINGLE.match(name)
        if match is not None:
            single.setdefault(match["home"], set()).add(int(match["number"]))
        elif len(shape) > 2 and (_PACKED.match(name) or _GRANITE.match(name)):
            found.add(shape[0])
    return frozenset(found | {len(numbers) for numbers in single.values()})


def _units(
    home: str, found: _Found, shapes: Mapping[str, tuple[int, ...]], count: int | None, parts: int
) -> ExpertUnits:
    if found.single and found.packed:
        raise CheckpointError(f"{home}.experts: has tensors of single experts, and {found.packed[0]} of all of them")
    size = count or (1 + max(found.single) if found.single else shapes[found.packed[0]][0])
    if parts > 1 and size % parts:
        raise CheckpointError(f"{home}: {size} experts cannot be divided into {parts} groups of equal size (n_group)")
    single = _single(home, found.single, shapes, size)
    for name in (*found.packed, *found.router):
        # a dimension that is not there has no rows
        rows = shapes[name][0] if shapes[name] else 0
        if rows != size:
            raise CheckpointError(
                f"{name}: has {rows} {'rows' if name in found.router else 'experts'}, and there are {size} experts"
            )
    weights = [name for name in found.router if len(shapes[name]) == 2]
    if len(weights) != 1:
        raise CheckpointError(
            f"{home}: its router's weight is missing"
            if not weights
            else f"{home}: has two routers, {weights[0]} and {weights[1]}"
        )
    router = (*weights, *(name for name in found.router if name not in weights))
    return ExpertUnits(f"{home} {EXPERTS}", size, parts, single, tuple(sorted(found.packed)), router)


def _single(
    home: str, found: Mapping[int, Mapping[str, str]], shapes: Mapping[str, tuple[int, ...]], size: int
) -> tuple[tuple[str, ...], ...]:
    """Return the names of each tensor of an expert, one per expert."""
    if not found:
        return ()
    for number in range(size):
        if number not in found:
            raise CheckpointError(f"{home}.experts: expert {number} is missing; there should be {size}")
    if len(found) > size:
        raise CheckpointError(f"{home}.experts: has an expert {max(found)}; config.json says {size} experts")
    leaves = sorted({leaf for own in found.values() for leaf in own})
    for number, own in sorted(found.items()):
        for leaf in leaves:
            name = f"{home}.experts.{number}.{leaf}"
            if leaf not in own:
                raise CheckpointError(f"{name}: is missing; other experts of this layer have it")
            wanted = shapes[found[0].get(leaf, name)]
            if shapes[name] != wanted:
                raise CheckpointError(
                    f"{name}: has the shape {list(shapes[name])}, that of expert 0 has {list(wanted)}; experts of one "
                    "layer must be alike"
                )
    return tuple(tuple(found[number][leaf] for number in range(size)) for leaf in leaves)
