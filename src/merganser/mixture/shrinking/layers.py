"""The layers of experts of a model: their tensors in the checkpoint, checked, read, and given new names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy.experts import ROUTERS, SHARED, common_size, sizes_of_layers
from ...calibration.forward.experts import expert_matrices, expert_modules, has_gate, has_norm
from ...calibration.forward.skeleton import Block, Skeleton
from ...errors import CheckpointError, UnsupportedError
from .experts import Experts

__all__ = ["Layer", "find_layers"]

_LEAVES = {
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
_SINGLE = re.compile(r"^(?P<head>.*\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)\.weight$")
_PACKED = re.compile(r"^.*\.experts\.(?P<leaf>gate_up_proj|down_proj)(?P<bias>_bias)?$")


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of experts.

    Args:
        block: Index of its block.
        name: Name of the module that holds the experts, in the model.
        module: That module.
        count: Number of its experts.
        single: By kind (`gate`, `up`, `down`), a tensor per expert; empty if the checkpoint packs them.
        packed: By the name of the module's parameter, the tensor of all experts; empty if it does not.
        router: Tensors with a row or value per expert: the router's weight first, then biases.
    """

    block: int
    name: str
    module: Any
    count: int
    single: Mapping[str, tuple[str, ...]]
    packed: Mapping[str, str]
    router: tuple[str, ...]

    @property
    def experts(self) -> list[str]:
        """The names of all tensors of experts."""
        return [*self.packed.values(), *(name for names in self.single.values() for name in names)]

    def read(self, stored: Callable[[str], Tensor]) -> Experts:
        """Read the experts.

        Args:
            stored: Returns a tensor as the checkpoint stores it.
        """
        module = self.module
        if self.single:
            units = {kind: torch.stack([stored(name).float() for name in names]) for kind, names in self.single.items()}
            units["down"] = units["down"].transpose(1, 2)
            return Experts(units, None, self._activate)
        both, down = (stored(self.packed[name]).float() for name in ("gate_up_proj", "down_proj"))
        if module.is_transposed:
            both = both.transpose(1, 2)
        else:
            down = down.transpose(1, 2)
        units = dict(zip(("gate", "up"), self._parts(both), strict=True)) | {"down": down}
        if "gate_up_proj_bias" not in self.packed:
            return Experts(units, None, self._activate)
        biases = self._parts(stored(self.packed["gate_up_proj_bias"]).float()[..., None])
        units |= dict(zip(("gate_bias", "up_bias"), biases, strict=True))
        return Experts(units, stored(self.packed["down_proj_bias"]).float(), self._activate)

    def _parts(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Split units of gate and up, shape [experts, 2 * units, width]."""
        if self.module.is_concatenated:
            half = both.shape[1] // 2
            return both[:, :half], both[:, half:]
        return both[:, ::2], both[:, 1::2]

    def _both(self, gate: Tensor, up: Tensor) -> Tensor:
        """Join what `_parts` split."""
        return torch.cat([gate, up], 1) if self.module.is_concatenated else torch.stack([gate, up], 2).flatten(1, 2)

    def _activate(self, gate: Tensor, up: Tensor) -> Tensor:
        # units are on the second axis of either
        found: Tensor = self.module._apply_gate(self._both(gate, up))
        return found

    def written(self, experts: Experts) -> dict[str, Tensor]:
        """Return experts as tensors of a checkpoint of this layout, by their names."""
        units = experts.units
        if self.single:
            return {
                self.named(kind, number): (own.T if kind == "down" else own).contiguous()
                for kind in self.single
                for number, own in enumerate(units[kind])
            }
        both, down = self._both(units["gate"], units["up"]), units["down"]
        transposed = self.module.is_transposed
        found = {
            "gate_up_proj": both.transpose(1, 2) if transposed else both,
            "down_proj": down if transposed else down.transpose(1, 2),
        }
        if experts.output_bias is not None:
            found["gate_up_proj_bias"] = self._both(units["gate_bias"], units["up_bias"])[..., 0]
            found["down_proj_bias"] = experts.output_bias
        return {self.packed[name]: own.contiguous() for name, own in found.items()}

    def named(self, kind: str, number: int) -> str:
        """Return the name of an expert's tensor, in a checkpoint with a tensor per expert."""
        match = _SINGLE.match(self.single[kind][0])
        assert match is not None
        return f"{match['head']}.{number}.{match['leaf']}.weight"


def find_layers(skeleton: Skeleton) -> list[Layer]:
    """Return the layers of experts, in order.

    Raises:
        CheckpointError: Experts or rows of routers are missing, or shapes differ.
        UnsupportedError: The model is not a mixture, or its experts are of an unknown kind.
    """
    found = [
        _layer(skeleton, index, block, f"{block.name}.{name}", module)
        for index, block in enumerate(skeleton.blocks)
        for name, module in expert_modules(block.module).items()
    ]
    reference = skeleton.checkpoint.reference
    if not found:
        kind = type(skeleton.model).__name__
        raise UnsupportedError(
            f"{reference}: the experts of {kind} are not computed as those that are known here, so they cannot be shrunk"
            if sizes_of_layers({name: own.shape for name, own in skeleton.checkpoint.tensors.items()})
            else f"{reference}: {kind} has no layers of experts"
        )
    common_size((layer.count for layer in found), str(reference))
    if len({layer.block for layer in found}) < len(found):
        raise UnsupportedError(f"{reference}: has several groups of experts in a layer")
    return found


@dataclass(frozen=True, slots=True)
class _Tensors:
    """What a checkpoint holds of a layer of experts.

    Args:
        single: By kind, then number of the expert, its tensors.
        packed: By the name of the module's parameter, the tensor of all experts.
        router: Tensors of the router, the weight first.
    """

    single: dict[str, dict[int, str]]
    packed: dict[str, str]
    router: list[str]

    @property
    def names(self) -> list[str]:
        """The names of all of them."""
        return [*self.router, *self.packed.values(), *(each for own in self.single.values() for each in own.values())]


def _layer(skeleton: Skeleton, index: int, block: Block, name: str, module: Any) -> Layer:
    reference = skeleton.checkpoint.reference
    first = next(iter(expert_matrices(module)))
    count, parent = len(getattr(module, first)), name.rpartition(".")[0]
    if not has_gate(module) or has_norm(module):
        raise UnsupportedError(f"{reference}: {name}: experts without a gate, or with a norm, cannot be shrunk")
    found = _tensors_of(skeleton, block, name, count)
    _check_experts(skeleton, name, module, count, found)
    _check_router(skeleton, parent, found.router, (count, module_width(module)))
    for source in found.names:
        dtype = skeleton.checkpoint.tensors[source].dtype
        if dtype.kind != "float" or dtype.itemsize > 4:
            raise UnsupportedError(
                f"{reference}: {source} holds {dtype.name}; experts are merged in float32, from floats of at most 32 bits"
            )
    single = {kind: tuple(own[number] for number in range(count)) for kind, own in found.single.items()}
    return Layer(
        block=index,
        name=name,
        module=module,
        count=count,
        single=single,
        packed=found.packed,
        router=tuple(found.router),
    )


def _tensors_of(skeleton: Skeleton, block: Block, name: str, count: int) -> _Tensors:
    """Return the tensors of the experts of a module, and of their router.

    Raises:
        UnsupportedError: One of them is of an unknown kind.
    """
    reference, parent = skeleton.checkpoint.reference, name.rpartition(".")[0]
    found = _Tensors({}, {}, [])
    for source in block.sources:
        target = skeleton.targets[source]
        parameter, shape = target.parameter, skeleton.checkpoint.tensors[source].shape
        if parameter.startswith(f"{name}."):
            # a family may have other names for packed experts than transformers
            match, whole = _SINGLE.match(source), _PACKED.match(parameter if target.alone else source)
            if match is not None and match["leaf"] in _LEAVES:
                found.single.setdefault(_LEAVES[match["leaf"]], {})[int(match["number"])] = source
            elif whole is not None:
                found.packed[whole["leaf"] + (whole["bias"] or "")] = source
            else:
                raise UnsupportedError(f"{reference}: {source}: experts with such a tensor cannot be shrunk")
        elif parameter.startswith(f"{parent}.") and parameter[len(parent) + 1 :].partition(".")[0] in ROUTERS:
            found.router.append(source)
        elif _per_expert(parameter, parent, shape, count):
            raise UnsupportedError(
                f"{reference}: {source} (shape {list(shape)}): it is not known what this tensor beside the experts holds, so "
                "their number cannot be changed"
            )
    found.router.sort(key=lambda source: not source.endswith(".weight"))
    return found


def _check_router(skeleton: Skeleton, parent: str, router: Sequence[str], shape: tuple[int, int]) -> None:
    """Check that a router has a row, or a value, per expert; `shape` is that of its weight.

    Raises:
        CheckpointError: It has not.
    """
    reference, tensors = skeleton.checkpoint.reference, skeleton.checkpoint.tensors
    if not router or not router[0].endswith(".weight"):
        raise CheckpointError(f"{reference}: {parent}: the router's weight is missing")
    for source in router:
        wanted = shape if source is router[0] else shape[:1]
        # ERNIE's bias has a dimension more
        if tensors[source].shape not in ((wanted,) if source is router[0] else (wanted, (1, shape[0]))):
            raise CheckpointError(
                f"{reference}: {source} has the shape {list(tensors[source].shape)}, and for {shape[0]} experts it must be "
                f"{list(wanted)}"
            )


def _per_expert(parameter: str, parent: str, shape: tuple[int, ...], count: int) -> bool:
    """Return whether a tensor beside the experts has something for each of them."""
    if not parameter.startswith(f"{parent}.") or parameter[len(parent) + 1 :].startswith(SHARED):
        return False
    return bool(shape) and count in (shape[0], shape[-1])


def module_width(module: Any) -> int:
    """Return the width of the inputs of a module of experts."""
    [first, *_] = expert_matrices(module).items()
    return int(getattr(module, first[0]).shape[first[1]])


def _check_experts(skeleton: Skeleton, name: str, module: nn.Module, count: int, found: _Tensors) -> None:
    """Check that all experts of a module are there, in the shapes that config.json asks for.

    Raises:
        CheckpointError: They are not.
    """
    reference, tensors = skeleton.checkpoint.reference, skeleton.checkpoint.tensors
    single, packed = found.single, found.packed
    if bool(single) == bool(packed):
        problem = "both packed and one by one" if single else "missing"
        raise CheckpointError(f"{reference}: {name}: the tensors of its experts are {problem}")
    parameters = {own: tuple(each.shape) for own, each in module.named_parameters()}
    if packed:
        for own, shape in parameters.items():
            if own not in packed:
                raise CheckpointError(f"{reference}: {name}.{own} is missing")
            if tensors[packed[own]].shape != shape:
                raise CheckpointError(
                    f"{reference}: {packed[own]} has the shape {list(tensors[packed[own]].shape)}, config.json asks for "
                    f"{list(shape)}"
                )
        return
    [_, both, width] = parameters["gate_up_proj"]
    if module.is_transposed:
        both, width = width, both
    wanted = {"gate": (both // 2, width), "up": (both // 2, width), "down": (width, both // 2)}
    for kind, shape in wanted.items():
        names = single.get(kind, {})
        for number in range(count):
            if number not in names:
                raise CheckpointError(
                    f"{reference}: {name}: expert {number} has no {kind} projection; config.json says {count} experts"
                )
            if tensors[names[number]].shape != shape:
                raise CheckpointError(
                    f"{reference}: {names[number]} has the shape {list(tensors[names[number]].shape)}, config.json asks for "
                    f"{list(shape)}"
                )
        if len(names) > count:
            raise CheckpointError(f"{reference}: {name} has an expert {max(names)}; config.json says {count} experts")
