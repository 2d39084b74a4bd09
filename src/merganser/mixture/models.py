"""The dense models of a mixture: their projections, checked to fit each other, and their tensors as a model reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..adapters.open import open_named
from ..anatomy.settings.function import settings
from ..checkpoint import Checkpoint, Reader, TensorInfo
from ..engine.in_memory.run import merge_to_state_dict
from ..engine.kernels.assignment import untouched
from ..engine.plan.part import part_of
from ..engine.plan.plan import Plan
from ..errors import CheckpointError, RecipeError
from .recipe import Expert

__all__ = ["DenseTensors", "ExpertTensors", "Layer", "find_layers", "open_expert"]

_PROJECTION = re.compile(r"^(?P<layer>.*\.(?P<number>\d+))\.mlp\.(?P<name>gate_proj|up_proj|down_proj)\.weight$")
_IN_MLP = re.compile(r"\.\d+\.mlp\.")
_SAME = ("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
"""Keys of config.json in which experts and base must agree; what one leaves out has its default."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of the dense models.

    Args:
        number: Its number.
        name: Its name, such as `model.layers.3`.
        projections: The tensor of each projection of the MLP, by the projection's name.
    """

    number: int
    name: str
    projections: Mapping[str, str]


def find_layers(base: Checkpoint) -> list[Layer]:
    """Return the layers of the base, in order.

    Raises:
        CheckpointError: It has no layers with gated MLPs, or something in them has no place in an expert.
    """
    found: dict[int, tuple[str, dict[str, str]]] = {}
    for name in base.tensors:
        match = _PROJECTION.match(name)
        if match is not None:
            found.setdefault(int(match["number"]), (match["layer"], {}))[1][match["name"]] = name
        elif _IN_MLP.search(name):
            raise CheckpointError(
                f"{base.reference}: {name} is part of an MLP, and the experts of a mixture have no such tensor"
            )
    layers = [Layer(number, name, own) for number, (name, own) in sorted(found.items())]
    if not layers:
        raise CheckpointError(
            f"{base.reference}: has no layers with gate_proj, up_proj and down_proj to make experts of"
        )
    wanted = base.config.get("num_hidden_layers")
    if [layer.number for layer in layers] != list(range(wanted if isinstance(wanted, int) else len(layers))):
        raise CheckpointError(f"{base.reference}: has MLPs in {len(layers)} layers, config.json says {wanted}")
    for layer in layers:
        lacking = {"gate_proj", "up_proj", "down_proj"} - layer.projections.keys()
        if lacking:
            raise CheckpointError(f"{base.reference}: {layer.name}.mlp.{min(lacking)}.weight is missing")
    return layers


def open_expert(expert: Expert, base: Checkpoint, layers: list[Layer], cache_dir: Path | None) -> Checkpoint:
    """Open an expert, and check that its MLPs fit the base.

    Raises:
        CheckpointError: It is missing or damaged, lacks a projection, or one has another shape than the base's.
        RecipeError: Its config differs from the base's in what the experts depend on.
    """
    found = open_named(expert.model, expert.place, cache_dir)
    check_expert(expert, found, base, layers)
    return found


def check_expert(expert: Expert, found: Checkpoint, base: Checkpoint, layers: list[Layer]) -> None:
    """Check that an expert's MLPs fit the base; raises as `open_expert` does."""
    configs = [{**settings(each.config), **each.config} for each in (found, base)]
    for key in _SAME:
        own, wanted = (config.get(key) for config in configs)
        if own != wanted:
            raise RecipeError(
                f"{expert.place}: {expert.model} has {key} {own!r}, the base {wanted!r}; all experts must be alike"
            )
    for layer in layers:
        for name in layer.projections.values():
            tensor = found.tensors.get(name)
            if tensor is None:
                raise CheckpointError(f"{expert.place}: {expert.model}: tensor {name!r} is missing; the base has it")
            wanted = base.tensors[name].shape
            if tensor.shape != wanted:
                raise CheckpointError(
                    f"{expert.place}: {expert.model}: {name} has the shape {list(tensor.shape)}, the base's has {list(wanted)}"
                )
            if tensor.dtype.kind != "float":
                raise CheckpointError(f"{expert.place}: {expert.model}: {name} holds {tensor.dtype.name}, no floats")
    extra = next((name for name in found.tensors if _IN_MLP.search(name) and not _PROJECTION.match(name)), None)
    if extra is not None:
        raise CheckpointError(
            f"{expert.place}: {expert.model}: {extra} is part of an MLP, and experts have no such tensor"
        )


class DenseTensors:
    """The tensors of the shared parts, and of MLPs made in the same way, as the plan writes them.

    Args:
        plan: The plan of a dense model.
        reader: Reads its inputs.
    """

    def __init__(self, plan: Plan, reader: Reader) -> None:
        self._plan = plan
        self._reader = reader
        self._planned = {tensor.name: tensor for tensor in plan.tensors}

    def tensor(self, info: TensorInfo, /) -> Tensor:
        """Return the tensor of this name."""
        planned = self._planned[info.name]
        if planned.copy or (planned.method is untouched().method and planned.parameters["scale"] == (1.0,)):
            return self._reader.tensor(planned.inputs[0]).to(getattr(torch, planned.dtype.name))
        return merge_to_state_dict(part_of(self._plan, [planned]))[info.name]


class ExpertTensors:
    """The tensors of the mixture as one of its experts sees it: shared parts, and this expert's MLPs.

    Args:
        dense: The shared parts.
        expert: The expert.
        checkpoint: Its tensors.
        layers: The layers.
        reader: Reads them.
    """

    def __init__(
        self, dense: DenseTensors, expert: Expert, checkpoint: Checkpoint, layers: list[Layer], reader: Reader
    ) -> None:
        self._dense = dense
        self._expert = expert
        self._checkpoint = checkpoint
        self._own = {name: kind for layer in layers for kind, name in layer.projections.items()}
        self._reader = reader

    def tensor(self, info: TensorInfo, /) -> Tensor:
        """Return the tensor of this name."""
        kind = self._own.get(info.name)
        if kind is None:
            return self._dense.tensor(info)
        found = self._reader.tensor(self._checkpoint.tensors[info.name])
        return found * self._expert.residual_scale if kind == "down_proj" else found
