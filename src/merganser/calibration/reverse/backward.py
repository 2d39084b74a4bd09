"""The reverse pass of one sequence through the head, or through one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import NonFiniteError
from ..data.batches import Batch, Padded
from ..forward.forward import Output, call_block, call_head
from ..forward.skeleton import Skeleton
from .gradient import Gradient, Uses
from .upstream import Upstream

__all__ = ["Scored", "block_backward", "head_backward", "head_loss", "outside_parameters"]

Gradients = dict[str, Gradient]
"""Gradients by parameter name; a parameter that the loss does not depend on is missing."""


class Scored(Protocol):
    """A loss."""

    def of(self, logits: Tensor, sequence: Padded, /) -> Tensor:
        """Return the loss of a sequence, 0-d, given logits of shape [1, longest, vocabulary]."""


@dataclass
class _Leaves:
    """Outputs of earlier blocks, as the variables that gradients are taken with respect to.

    Args:
        outputs: What the model gets: copies, since it may work in place.
        hidden: The hidden states, by stack.
        rest: The further values of the tuples, by stack; None for those without a gradient.
    """

    outputs: dict[int, Output]
    hidden: dict[int, Tensor]
    rest: dict[int, list[Tensor | None]]

    @classmethod
    def of(cls, before: Mapping[int, Output]) -> _Leaves:
        leaves = cls({}, {}, {})
        for stack, output in before.items():
            hidden = output.hidden.detach().requires_grad_()
            rest = [value.detach().requires_grad_() if _has_gradient(value) else None for value in output.rest or ()]
            copies = [v if own is None else own.clone() for v, own in zip(output.rest or (), rest, strict=True)]
            leaves.hidden[stack], leaves.rest[stack] = hidden, rest
            leaves.outputs[stack] = Output(hidden.clone(), None if output.rest is None else tuple(copies))
        return leaves


def outside_parameters(skeleton: Skeleton) -> dict[str, nn.Parameter]:
    """Return the parameters outside the blocks, by name; tied ones once."""
    inside = {id(own) for block in skeleton.blocks for own in block.module.parameters()}
    return {
        name: own for name, own in skeleton.model.named_parameters() if id(own) not in inside and _has_gradient(own)
    }


def head_backward(
    skeleton: Skeleton, batch: Batch, last: Mapping[int, Output], loss: Scored, outside: Mapping[str, nn.Parameter]
) -> tuple[float, Upstream, Uses]:
    """Compute the loss of a sequence from the last block's output, and its gradient.

    Args:
        skeleton: The model, with the weights outside its blocks loaded.
        batch: One sequence.
        last: The output of each stack's last block.
        loss: The loss.
        outside: Parameters whose gradients are wanted.

    Returns:
        The loss; the gradient for the last block; how the parameters are used, with their gradients.

    Raises:
        NonFiniteError: The loss or its gradient is NaN or infinite.
    """
    with torch.enable_grad():
        leaves = _Leaves.of(last)
        uses = Uses(outside)
        with uses:
            logits = call_head(skeleton, batch, leaves.outputs)
        value = _finite(loss.of(logits, batch.stacks[-1]), batch)
        upstream = Upstream()
        uses.add(_differentiate([value], [torch.ones_like(value)], leaves, outside, upstream))
    return float(value.detach()), upstream, uses


@torch.no_grad()
def head_loss(skeleton: Skeleton, batch: Batch, last: Mapping[int, Output], loss: Scored) -> float:
    """Compute the loss of a sequence from the last block's output; arguments and errors are those of `head_backward`."""
    return float(_finite(loss.of(call_head(skeleton, batch, last), batch.stacks[-1]), batch))


def _finite(value: Tensor, batch: Batch) -> Tensor:
    if not bool(value.isfinite()):
        raise NonFiniteError(f"{batch.where[0]}: the loss of the model is NaN or infinite for this text")
    return value


def block_backward(
    skeleton: Skeleton,
    index: int,
    batch: Batch,
    before: Mapping[int, Output],
    upstream: Upstream,
    parameters: Mapping[str, nn.Parameter],
) -> tuple[Upstream, Gradients]:
    """Recompute a block on one sequence, and take the gradient of the loss with respect to what it received.

    Args:
        skeleton: The model; the weights of the block are loaded.
        index: Index of the block.
        batch: One sequence.
        before: By stack, the output of its last block before this one.
        upstream: The gradient with respect to this block's output.
        parameters: Parameters whose gradients are wanted.

    Returns:
        The gradient for the block before; the gradients of the parameters.

    Raises:
        NonFiniteError: A gradient is NaN or infinite.
    """
    block = skeleton.blocks[index]
    with torch.enable_grad():
        leaves = _Leaves.of(before)
        uses = Uses(parameters)
        with uses:
            output = call_block(skeleton, index, batch, leaves.outputs)
        given = upstream.hidden.get(block.stack)
        outputs = [output.hidden]
        gradients = [torch.zeros_like(output.hidden) if given is None else given]
        for value, own in zip(output.rest or (), upstream.rest.get(block.stack, ()), strict=False):
            if own is not None and isinstance(value, Tensor) and value.requires_grad:
                outputs.append(value)
                gradients.append(own)
        passed = Upstream(
            {stack: own for stack, own in upstream.hidden.items() if stack != block.stack},
            {stack: own for stack, own in upstream.rest.items() if stack != block.stack},
            upstream.outside,
        )
        uses.add(_differentiate(outputs, gradients, leaves, parameters, passed))
    for gradient in passed.hidden.values():
        if not bool(gradient.isfinite().all()):
            raise NonFiniteError(
                f"{batch.where[0]}: the gradient of the loss is NaN or infinite for this text, in {block.name}; leave this "
                "text out, and if others fail too, the model is damaged"
            )
    return passed, uses.gradients


def _differentiate(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    leaves: _Leaves,
    parameters: Mapping[str, nn.Parameter],
    upstream: Upstream,
) -> dict[str, Tensor]:
    """Add the gradients of what blocks received to `upstream`; return those of the parameters that autograd finds."""
    rest = [(stack, i, own) for stack, values in leaves.rest.items() for i, own in enumerate(values) if own is not None]
    inputs = [*leaves.hidden.values(), *(own for _, _, own in rest), *parameters.values()]
    found = list(torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))
    for stack in leaves.hidden:
        upstream.hidden.update(_added(stack, upstream.hidden.get(stack), found.pop(0)))
    for stack, values in leaves.rest.items():
        upstream.rest.setdefault(stack, [None] * len(values))
    for stack, i, _ in rest:
        upstream.rest[stack][i] = _added(i, upstream.rest[stack][i], found.pop(0)).get(i)
    return {name: own for name, own in zip(parameters, found, strict=True) if own is not None}


def _added(key: int, one: Tensor | None, other: Tensor | None) -> dict[int, Tensor]:
    """Return the sum of those that exist under a key; nothing if none does."""
    given = [own for own in (one, other) if own is not None]
    return {key: sum(given[1:], given[0])} if given else {}


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
