"""Fit the last matrix of a block, so that the block passes on what its next one received in its own model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.linalg.least_squares import solve_right
from ..data.batches import Batch
from ..forward import internals
from ..forward.skeleton import Skeleton
from ..forward.stream import Stream
from .states import Kept

__all__ = ["RIDGES", "Fitted", "Sums", "Writer", "choose", "find_writer", "measure"]

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Ridges that are tried, over the mean of the diagonal of the Gram matrix of the inputs."""


@dataclass(frozen=True)
class Writer:
    """The matrix of a block whose product is added to the hidden states that the block returns, and to nothing else.

    Args:
        name: Its tensor in the checkpoint.
        module: The module that multiplies by it.
        axis: The axis of its weight that is contracted with the input.
    """

    name: str
    module: nn.Module
    axis: int


@dataclass(frozen=True)
class Fitted:
    """A fitted matrix.

    Args:
        weight: Its new weight, in the dtype in which it is stored.
        ridge: The ridge that was chosen.
        before: Mean squared relative error of what the block passes on, on the held-out text, with the old weight.
        after: The same with the new one.
    """

    weight: Tensor
    ridge: float
    before: float
    after: float


@dataclass
class Sums:
    """Sums over tokens from which the error of what a block passes on follows for any weight of its writer, float64.

    Args:
        gram: Sum of w x x^T, shape [in, in], where x is the input of the writer and w the weight of the token.
        pull: Sum of w r x^T, shape [out, in], where r is what the output lacks.
        rest: Sum of w r^T r.
        tokens: Number of tokens.
    """

    gram: Tensor
    pull: Tensor
    rest: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, outputs: int, inputs: int) -> Sums:
        """Return the sums over no tokens."""
        zeros = torch.zeros(inputs, inputs, dtype=torch.float64)
        return cls(zeros, torch.zeros(outputs, inputs, dtype=torch.float64))

    def add(self, inputs: Tensor, found: Tensor, expected: Tensor) -> None:
        """Add tokens; each counts by the inverse square of the norm of its hidden states.

        Norms of single tokens are hundreds of times those of others, where models keep "attention sinks"; they would rule
        an unweighted fit, and what follows sees hidden states behind a norm.

        Args:
            inputs: Inputs of the writer, shape [tokens, in].
            found: What the block passes on, shape [tokens, out].
            expected: What it should pass on, same shape.
        """
        found, expected = found.double(), expected.double()
        size = torch.maximum(found.norm(dim=1, keepdim=True), expected.norm(dim=1, keepdim=True)).clamp(min=1e-30)
        x, lack = inputs.double() / size, (expected - found) / size
        self.gram.addmm_(x.T, x)
        self.pull.addmm_(lack.T, x)
        self.rest += lack.square().sum().item()
        self.tokens += len(x)

    def error(self, change: Tensor | None = None) -> float:
        """Return the mean squared error with the writer's weight plus a change, shape [out, in], float64."""
        found = self.rest
        if change is not None:
            found += ((change @ self.gram - 2 * self.pull) * change).sum().item()
        return found / max(self.tokens, 1)


def find_writer(skeleton: Skeleton, index: int, stream: Stream) -> Writer | None:
    """Return the writer of the next block of a stream, whose weights are loaded; None if the block has none.

    It is found by trying: what is added to the output of the module must be added to the output of the block. That is not
    so in blocks with a norm after the MLP (Gemma 2 and 3, OLMo 2) or with a mixture of experts.

    Args:
        skeleton: The model.
        index: Number of the block.
        stream: Its text.
    """
    block = skeleton.blocks[index]
    kinds = internals.linear_classes()
    called: list[tuple[str, nn.Module]] = []

    def note(name: str) -> Any:
        return lambda module, args, output: called.append((name, module))

    found: Iterable[tuple[str, nn.Module]] = block.module.named_modules()
    modules = [(name, module) for name, module in found if type(module) in kinds]
    handles = [module.register_forward_hook(note(name)) for name, module in modules]
    try:
        plain = stream.output(0).hidden
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        return None
    # whatever a block calls last
    name, module = called[-1]
    axis = kinds[type(module)]
    weight = module.get_parameter("weight")
    if weight.shape[1 - axis] != plain.shape[-1]:
        return None
    tensor = _stored(skeleton, f"{block.name}.{name}.weight", weight)
    noise = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0)) * plain.abs().mean()
    handle = module.register_forward_hook(lambda module, args, output: output + noise)
    try:
        moved = stream.output(0).hidden - plain
    finally:
        handle.remove()
    valid = stream.batches[0].stacks[0].valid
    added = (moved[valid] - noise).abs().max() <= 1e-3 * noise.abs().max() + 1e-5 * plain[valid].abs().max()
    return Writer(tensor, module, axis) if tensor is not None and bool(added) else None


def _stored(skeleton: Skeleton, parameter: str, weight: Tensor) -> str | None:
    """Return the checkpoint's tensor that is this parameter and nothing else; None if there is none."""
    names = [name for name, target in skeleton.targets.items() if target.parameter == parameter]
    if len(names) != 1 or skeleton.targets[names[0]].index is not None:
        return None
    info = skeleton.checkpoint.tensors[names[0]]
    return names[0] if info.shape == tuple(weight.shape) and info.dtype.kind == "float" else None


def measure(
    writer: Writer, stream: Stream, expected: Kept, boundary: int, held: Sequence[Sequence[bool]]
) -> tuple[Sums, Sums]:
    """Run the next block of a stream, and return the sums over the text of the fit and over the held-out text.

    Args:
        writer: The block's writer.
        stream: The text.
        expected: The hidden states of the model that the next block came from.
        boundary: Which of them the next block received there.
        held: For each batch, which of its sequences are held out.
    """
    weight = writer.module.get_parameter("weight")
    sums = tuple(Sums.empty(weight.shape[1 - writer.axis], weight.shape[writer.axis]) for _ in range(2))
    inputs: list[Tensor] = []
    handle = writer.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        for number, batch in enumerate(stream.batches):
            found = stream.output(number).hidden
            counted, out = _rows(batch, held[number])
            wanted = expected.read(boundary, batch)
            own, passed = inputs.pop().reshape(*counted.shape, -1)[counted], found[counted]
            for kept, chosen in zip(sums, (~out, out), strict=True):
                if bool(chosen.any()):
                    kept.add(own[chosen], passed[chosen], wanted[chosen])
    finally:
        handle.remove()
    return sums[0], sums[1]


def _rows(batch: Batch, held: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Return which tokens count, shape [sequences, longest], and for each of these whether it is held out."""
    counted = batch.stacks[0].counted
    return counted, torch.tensor(held)[:, None].expand(counted.shape)[counted]


def choose(writer: Writer, sums: Sums, held: Sums, dtype: torch.dtype) -> Fitted | None:
    """Return the writer's weight with the least error on held-out text, among several ridges.

    The error is a sum over tokens of |W x + rest - expected|^2, and the ridge pulls W towards what it is. It is computed
    with the rounded weight.

    Args:
        writer: The writer.
        sums: Of the text of the fit.
        held: Of the held-out text.
        dtype: In which the weight is stored.

    Returns:
        None if no weight has less error than the present one on both texts.
    """
    present = writer.module.get_parameter("weight").detach().double()
    # as the columns of the inputs, whatever the layout
    turned = writer.axis == 0
    best: Fitted | None = None
    before = held.error()
    for ridge in RIDGES:
        change = solve_right(sums.pull, sums.gram.clone(), torch.tensor(ridge, dtype=torch.float64))
        weight = (present + (change.T if turned else change)).to(dtype)
        actual = weight.double() - present
        actual = actual.T if turned else actual
        after = held.error(actual)
        if after < (before if best is None else best.after) and sums.error(actual) < sums.error():
            best = Fitted(weight, ridge, before, after)
    return best
