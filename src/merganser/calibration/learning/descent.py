"""The gradient of the loss with respect to all coefficients: one forward and reverse pass through the merged model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import NonFiniteError
from ..data.batches import Batch
from ..forward.skeleton import Skeleton
from ..forward.stream import Stream
from ..reverse.backward import Scored, block_backward, head_backward, outside_parameters
from ..reverse.gradient import Gradient
from ..reverse.parameters import Part, block_parameters, find_parts
from ..reverse.upstream import Upstream
from .coefficients import Coefficients, LearntTensors

__all__ = ["LossOf", "Passes"]

LossOf = Callable[[int], Scored]
"""Returns the loss of a sequence, given its number; called with the weights outside the blocks loaded."""


class Passes:
    """Passes of sequences through the merged model, whose weights are made of coefficients block by block.

    Args:
        skeleton: The merged model, in float32.
        coefficients: The coefficients.
        weights: The weights that they make.
        folder: Folder for the outputs of blocks; it must exist.
    """

    def __init__(self, skeleton: Skeleton, coefficients: Coefficients, weights: LearntTensors, folder: Path) -> None:
        self._skeleton = skeleton
        self._coefficients = coefficients
        self._weights = weights
        self._folder = folder
        self._parts: dict[int, Mapping[str, Part]] = {}

    def fill_outside(self) -> None:
        """Load the weights outside the blocks as they are merged now."""
        skeleton = self._skeleton
        self._weights.prepare(skeleton.outside(head=True))
        skeleton.fill_outside(head=True, source=self._weights)

    def forward(self, batches: Sequence[Batch]) -> Stream:
        """Run all blocks on some sequences; the weights outside the blocks must be loaded.

        Returns:
            The outputs of every block for every sequence, kept on disk for `backward`.
        """
        stream = Stream(self._skeleton, batches, self._folder, keep=True)
        for block in self._skeleton.blocks:
            self._weights.prepare(block.sources)
            with self._skeleton.filled(block, self._weights):
                stream.advance(lambda batch: None)
        return stream

    def backward(self, stream: Stream, loss: LossOf, parts: Sequence[Sequence[int]]) -> list[float]:
        """Add the gradients of sums of the losses of sequences to the coefficients.

        Args:
            stream: From `forward`.
            loss: The loss of each sequence.
            parts: The numbers of the sequences whose losses make one sum: all sequences in turn, cut into pieces.

        Returns:
            The losses.

        Raises:
            NonFiniteError: A loss or a gradient is NaN or infinite.
        """
        skeleton = self._skeleton
        outside = outside_parameters(skeleton)
        for own in outside.values():
            own.requires_grad_(True)
        losses: list[float] = []
        upstreams: list[Upstream] = []
        totals: list[dict[str, Tensor]] = [{} for _ in parts]
        for part, total in zip(parts, totals, strict=True):
            for number in part:
                last = stream.before(number, len(skeleton.blocks))
                value, upstream, uses = head_backward(skeleton, stream.batches[number], last, loss(number), outside)
                losses.append(value)
                upstreams.append(upstream)
                _add(total, uses.gradients, outside)
        for index in reversed(range(len(skeleton.blocks))):
            upstreams = self._visit(index, stream, upstreams, outside, parts, totals)
        self._weights.prepare(skeleton.outside(head=True))
        for which, total in enumerate(totals):
            _check_finite(total, "what is outside the blocks")
            self._add_gradients(-1, skeleton.outside(head=True), outside, total, which)
        return losses

    def _visit(
        self,
        index: int,
        stream: Stream,
        upstreams: Sequence[Upstream],
        outside: Mapping[str, nn.Parameter],
        parts: Sequence[Sequence[int]],
        totals: Sequence[dict[str, Tensor]],
    ) -> list[Upstream]:
        """Take the gradients of a block over all sequences; those of weights outside the blocks are added to `totals`."""
        skeleton, block = self._skeleton, self._skeleton.blocks[index]
        passed: list[Upstream] = []
        self._weights.prepare(block.sources)
        with skeleton.filled(block, self._weights):
            own = block_parameters(block)
            for each in own.values():
                each.requires_grad_(True)
            for which, (part, total) in enumerate(zip(parts, totals, strict=True)):
                inside: dict[str, Tensor] = {}
                for number in part:
                    batch, before = stream.batches[number], stream.before(number, index)
                    upstream, found = block_backward(
                        skeleton, index, batch, before, upstreams[number], {**own, **outside}
                    )
                    passed.append(upstream)
                    _add(inside, {name: found.pop(name) for name in own if name in found}, own)
                    _add(total, found, outside)
                _check_finite(inside, block.name)
                self._add_gradients(index, block.sources, own, inside, which)
        return passed

    def _add_gradients(
        self,
        key: int,
        sources: Sequence[str],
        parameters: Mapping[str, nn.Parameter],
        gradients: Mapping[str, Tensor],
        loss: int,
    ) -> None:
        """Add the gradients of the coefficients of some tensors, by the chain rule, given those of the parameters that they fill."""
        if key not in self._parts:
            learnt = [source for source in sources if source in self._coefficients]
            self._parts[key] = find_parts(self._skeleton, learnt, parameters, self._weights.named)[0]
        for source, part in self._parts[key].items():
            if part.parameter in gradients:
                self._coefficients.add_gradient(source, part.of(gradients[part.parameter]), loss)


@torch.no_grad()
def _add(total: dict[str, Tensor], found: Mapping[str, Gradient], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, gradient in found.items():
        if name not in total:
            total[name] = torch.zeros_like(parameters[name], requires_grad=False)
        gradient.add_to(total[name])


def _check_finite(gradients: Mapping[str, Tensor], where: str) -> None:
    if not all(bool(own.isfinite().all()) for own in gradients.values()):
        raise NonFiniteError(f"the merged model: the gradient of the loss is NaN or infinite, in {where}")
