"""Where the gradient of a checkpoint's tensor is found: a parameter of the model may be made of several tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..forward.skeleton import Block, Skeleton

__all__ = ["Part", "block_parameters", "find_parts", "likely_parts"]


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a parameter that a tensor of the checkpoint fills.

    Args:
        parameter: Name of the parameter in the model.
        index: Index along its first axis if it stacks experts, else None.
        axis: The axis along which several tensors are joined, of the parameter or of the expert's entry.
        start: First index along that axis.
        length: Number of indices; None for all.
        turned: Whether the tensor is the transpose of this.
    """

    parameter: str
    index: int | None = None
    axis: int = 0
    start: int = 0
    length: int | None = None
    turned: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """Return the part of a tensor in the shape of the parameter, as the checkpoint's tensor is laid out."""
        own = whole if self.index is None else whole[self.index]
        if self.length is not None:
            own = own.narrow(self.axis, self.start, self.length)
        return own.T if self.turned else own


def block_parameters(block: Block) -> dict[str, nn.Parameter]:
    """Return the float parameters of a block, by their names in the model."""
    own = {f"{block.name}.{name}": each for name, each in block.module.named_parameters()}
    return {name: each for name, each in own.items() if each.is_floating_point()}


def find_parts(
    skeleton: Skeleton,
    sources: Sequence[str],
    parameters: Mapping[str, nn.Parameter],
    read: Callable[[str], Tensor] | None = None,
) -> tuple[dict[str, Part], list[str]]:
    """Find, for tensors of a checkpoint, the part of the model's parameters that has their values.

    transformers joins, stacks and transposes tensors on loading, differently from model to model; comparing values
    finds out what it did.

    Args:
        skeleton: The model.
        sources: Names of tensors.
        parameters: Loaded parameters, by name.
        read: Returns a tensor that they were loaded from; None for those of the checkpoint.

    Returns:
        The parts by name of the tensor, and the names of float tensors whose values are in no parameter as they are.
        Tensors that fill a buffer are in neither.
    """
    names = _by_name(skeleton, parameters)
    taken: set[Part] = set()
    found: dict[str, Part] = {}
    missing: list[str] = []
    for source in sources:
        target = skeleton.targets[source]
        name = names.get(target.parameter)
        if name is None:
            continue
        parameter = parameters[name].detach()
        stored = (read or skeleton.stored)(source).to(parameter.dtype)
        options = (
            part
            for part in _options(name, target.index, parameter, stored)
            if part not in taken and torch.equal(part.of(parameter), stored)
        )
        part = next(options, None)
        if part is None:
            missing.append(source)
            continue
        found[source] = part
        # joined tensors with the same values, such as zeros, get a part each; tied ones share theirs
        if part.length is not None:
            taken.add(part)
    return found, missing


def likely_parts(skeleton: Skeleton, sources: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> dict[str, Part]:
    """Return the parts that tensors of a checkpoint have by their shapes, before any weights are loaded.

    Args:
        skeleton: The model.
        sources: Names of tensors.
        parameters: Parameters, by name.

    Returns:
        The parts by name of the tensor. Which of several equal pieces of a parameter is a tensor's is not known.
    """
    names = _by_name(skeleton, parameters)
    found: dict[str, Part] = {}
    for source in sources:
        target = skeleton.targets[source]
        name = names.get(target.parameter)
        if name is not None:
            stored = torch.empty(skeleton.checkpoint.tensors[source].shape, device="meta")
            part = next(_options(name, target.index, parameters[name], stored), None)
            found |= {} if part is None else {source: part}
    return found


def _by_name(skeleton: Skeleton, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Return, for every name of a parameter, the name under which `parameters` has it; tied ones have several."""
    own = {id(parameter): name for name, parameter in parameters.items()}
    every = skeleton.model.named_parameters(remove_duplicate=False)
    return {name: own[id(parameter)] for name, parameter in every if id(parameter) in own}


def _options(name: str, index: int | None, parameter: Tensor, stored: Tensor) -> Iterator[Part]:
    whole = parameter if index is None else parameter[index]
    if whole.dim() != stored.dim():
        return
    for turned in (False, True) if stored.dim() == 2 else (False,):
        shape = tuple(stored.T.shape if turned else stored.shape)
        if shape == tuple(whole.shape):
            yield Part(name, index, turned=turned)
        for axis, length in enumerate(shape):
            others = [i for i in range(len(shape)) if i != axis]
            if length and length < whole.shape[axis] and all(shape[i] == whole.shape[i] for i in others):
                for start in range(0, whole.shape[axis] - length + 1, length):
                    yield Part(name, index, axis, start, length, turned)
