"""Gram matrices of the gradients with respect to the outputs of matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..forward import internals
from ..forward.skeleton import Block
from ..output.writer import Sum
from ..sums.reducers import Gram
from .parameters import Part

__all__ = ["GradientTaps"]


class GradientTaps:
    """Sums of `g gᵀ` over tokens, with `g` the gradient of the loss with respect to the output of a matrix.

    Args:
        block: A block; its weights are loaded.
        parts: The checkpoint's tensors in the block.
    """

    def __init__(self, block: Block, parts: Mapping[str, Part]) -> None:
        self._block = block
        self._parts = parts
        self._grams: dict[str, Gram] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe the block's forward and its reverse pass within the context."""
        wanted = {part.parameter for part in self._parts.values()}
        kinds = tuple(internals.linear_classes())
        with ExitStack() as stack:
            for name, module in self._block.module.named_modules():
                parameter = f"{self._block.name}.{name}.weight"
                if isinstance(module, kinds) and parameter in wanted:
                    handle = module.register_forward_hook(partial(self._receive, parameter))
                    stack.callback(handle.remove)
            yield

    def _receive(self, parameter: str, module: nn.Module, inputs: Sequence[Any], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._add, parameter))  # type: ignore[no-untyped-call]

    def _add(self, parameter: str, gradient: Tensor) -> None:
        if parameter not in self._grams:
            self._grams[parameter] = Gram(gradient.shape[-1])
        self._grams[parameter].add(gradient.flatten(0, -2))

    def results(self) -> dict[tuple[str, str], Sum]:
        """Return the sums by statistic and tensor, once the block is done."""
        found: dict[tuple[str, str], Sum] = {}
        for source, part in self._parts.items():
            gram = self._grams.get(part.parameter)
            # a joined tensor has only a part of the outputs
            if gram is not None and part.length is None and part.index is None:
                found["gradient_gram", source] = Sum(Gram.shape_of(gram.width), Gram.stored_as, gram.result)
        return found
