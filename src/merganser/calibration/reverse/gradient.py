"""The gradient of one sequence's loss with respect to a parameter, as the sum of a few terms.

The gradient of a matrix of a linear layer is a product of two factors, the gradient of the layer's output and its input; that
of an embedding is zero except in the rows that the sequence looks up. Factors and rows are much smaller than the whole gradient,
so they are kept in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["Gradient", "Uses", "part_gradients"]

Keep = Callable[[Tensor, Tensor], None]
"""Called in a reverse pass with the input of a function and the gradient of its output."""


@dataclass
class Gradient:
    """The sum of these terms.

    Args:
        products: Pairs of matrices, shapes [tokens, rows] and [tokens, columns]: the transpose of the first, times the
            second.
        rows: Indices along the first axis, int64, ascending, each once, and the values there.
        dense: A tensor in the shape of the parameter.
        skipped: Indices along the first axis, ascending, where the products are taken to be zero.
    """

    products: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rows: tuple[Tensor, Tensor] | None = None
    dense: Tensor | None = None
    skipped: Tensor | None = None

    @property
    def only_rows(self) -> bool:
        """Whether all terms are rows."""
        return not self.products and self.dense is None

    def add_rows(self, indices: Tensor, values: Tensor) -> None:
        """Add values at indices along the first axis; an index may occur more than once."""
        if self.rows is not None:
            indices, values = torch.cat([self.rows[0], indices]), torch.cat([self.rows[1], values])
        unique, place = indices.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        self.rows = unique, values.new_zeros(len(unique), *values.shape[1:]).index_add_(0, place, values)

    def of_rows(self, indices: Tensor) -> Tensor:
        """Return the rows of the sum of all products with some indices, shape [indices, columns]."""
        return torch.stack([left[:, indices].T @ right for left, right in self.products]).sum(0)

    def add_to(self, total: Tensor) -> None:
        """Add all terms to a tensor in the shape of the parameter."""
        if self.dense is not None:
            total += self.dense
        for left, right in self.products:
            if total.dtype == left.dtype:
                total.addmm_(left.T, right)
            else:
                total += left.T @ right
        if self.rows is not None:
            # a tensor without axes has its one entry as a row
            total.view(total.shape or (1,)).index_add_(0, *self.rows)

    def whole(self, parameter: Tensor) -> Tensor:
        """Return the sum of all terms, in the shape of the parameter."""
        total = torch.zeros_like(parameter, requires_grad=False)
        self.add_to(total)
        return total

    def as_rows(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices along the first axis where the sum is not zero, and the values there."""
        if self.rows is not None and self.only_rows:
            return self.rows
        whole = self.whole(parameter).reshape(parameter.shape or (1,))
        indices = whole.reshape(len(whole), -1).any(1).nonzero()[:, 0]
        return indices, whole[indices]

    def into(self, piece: Tensor, start: int) -> None:
        """Compute some rows of the sum.

        Args:
            piece: Where they are written, shape [rows, columns]; without products and rows, of the flat tensor [entries, 1].
            start: Index of the first one.
        """
        end = start + len(piece)
        for number, (left, right) in enumerate(self.products):
            if number:
                piece.addmm_(left[:, start:end].T, right)
            else:
                torch.mm(left[:, start:end].T, right, out=piece)
        if not self.products:
            piece.zero_()
        if self.skipped is not None:
            piece[_within(self.skipped, start, end) - start] = 0
        if self.dense is not None:
            piece += self.dense.reshape(-1, piece.shape[1])[start:end]
        if self.rows is not None:
            indices = _within(self.rows[0], start, end)
            first = int(torch.searchsorted(self.rows[0], start))
            values = self.rows[1][first : first + len(indices)]
            piece.index_add_(0, indices - start, values.reshape(len(indices), piece.shape[1]))

    def tensors(self) -> Iterator[Tensor]:
        """Return everything that is held in memory."""
        for pair in self.products:
            yield from pair
        yield from self.rows or ()
        if self.dense is not None:
            yield self.dense


def _within(indices: Tensor, start: int, end: int) -> Tensor:
    """Return the part of ascending indices from `start` to before `end`."""
    first, last = torch.searchsorted(indices, torch.tensor([start, end])).tolist()
    return indices[first:last]


class Uses(TorchFunctionMode):
    """Observes how parameters are used within the context; their gradients as matrices and tables are not formed.

    The results of all functions are unchanged. Uses other than as the matrix of a linear layer, or as a table of tokens, are
    left to autograd.

    Args:
        parameters: The parameters, by name; they require gradients.

    Attributes:
        gradients: By name, the gradients of linear layers and look-ups, summed over the reverse passes so far.
        products: By name, how often a parameter was the matrix of a linear layer.
        looked_up: By name, indices of the rows that were looked up, ascending, each once.
        others: Names of parameters that were used in any other way.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters = parameters
        self._names = {id(own): name for name, own in parameters.items()}
        self.gradients: dict[str, Gradient] = {}
        self.products: Counter[str] = Counter()
        self.looked_up: dict[str, Tensor] = {}
        self.others: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        handler = _HANDLERS.get(func) if torch.is_grad_enabled() else None
        found = None if handler is None else handler(self, *args, **given)
        if found is not None:
            return found
        found = func(*args, **given)
        used = {self._names[id(own)] for own in _flat((*args, *given.values())) if id(own) in self._names}
        # reading only a shape or a dtype does not count as a use
        if used and any(isinstance(own, Tensor) and own.requires_grad for own in _flat((found,))):
            self.others |= used
        return found

    def add(self, dense: Mapping[str, Tensor]) -> None:
        """Add the gradients that autograd found, by name, each in the shape of its parameter."""
        for name, own in dense.items():
            self.gradients.setdefault(name, Gradient()).dense = own

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        return self._product(input, weight, bias, turned=False)

    def _addmm(self, input: Tensor, mat1: Tensor, mat2: Tensor, **others: Any) -> Tensor | None:
        if others or input.shape != mat2.shape[1:]:
            return None
        return self._product(mat1, mat2, input, turned=True)

    def _product(self, given: Tensor, weight: Tensor, bias: Tensor | None, *, turned: bool) -> Tensor | None:
        name = self._names.get(id(weight))
        if name is None:
            return None
        self.products[name] += 1

        def keep(received: Tensor, gradient: Tensor) -> None:
            pair = (received, gradient) if turned else (gradient, received)
            self.gradients.setdefault(name, Gradient()).products.append(pair)

        found: Tensor = _Product.apply(keep, turned, given, weight, bias)  # type: ignore[no-untyped-call]
        return found

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor | None:
        name = self._names.get(id(weight))
        if name is None or max_norm is not None or scale_grad_by_freq or sparse:
            return None
        seen = [input.flatten().long(), *([self.looked_up[name]] if name in self.looked_up else [])]
        self.looked_up[name] = torch.cat(seen).unique()  # type: ignore[no-untyped-call]

        def keep(received: Tensor, gradient: Tensor) -> None:
            indices, values = received.flatten().long(), gradient.reshape(received.numel(), -1)
            if padding_idx is not None:
                trained = indices != padding_idx % len(weight)
                indices, values = indices[trained], values[trained]
            self.gradients.setdefault(name, Gradient()).add_rows(indices, values)

        found: Tensor = _Lookup.apply(keep, input, weight, padding_idx)  # type: ignore[no-untyped-call]
        return found


def part_gradients(
    uses: Uses, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Gradient], dict[str, tuple[Tensor, Tensor]]]:
    """Split the gradients of a head's reverse pass into those that can be summed at once and those that blocks may add to.

    A large output matrix would take as much to be formed again as a reverse pass through the head.

    Args:
        uses: How a whole forward uses the parameters, with the gradients of the head alone.
        parameters: The parameters, by name.

    Returns:
        Gradients to which nothing will be added, by name; of a table of tokens without the rows that are looked up, which
        get more behind the blocks. The rows that are not among these, and their values, by name.
    """
    formed: dict[str, Gradient] = {}
    rest: dict[str, tuple[Tensor, Tensor]] = {}
    for name, gradient in uses.gradients.items():
        seen = uses.looked_up.get(name)
        in_head_alone = len(gradient.products) == uses.products[name] and name not in uses.others
        if not gradient.products or not in_head_alone or gradient.dense is not None:
            rest[name] = gradient.as_rows(parameters[name])
            continue
        formed[name] = gradient
        if seen is not None:
            rest[name] = seen, gradient.of_rows(seen)
            gradient.skipped = seen
    return formed, rest


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    for own in values:
        if isinstance(own, (tuple, list)):
            yield from own
        else:
            yield own


class _Product(torch.autograd.Function):
    """A linear layer that hands out the two factors of its matrix's gradient."""

    @staticmethod
    def forward(ctx: Any, keep: Keep, turned: bool, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.keep, ctx.turned = keep, turned
        ctx.save_for_backward(given, weight)
        if turned and bias is not None:
            return torch.addmm(bias, given, weight)
        return functional.linear(given, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        given, weight = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        ctx.keep(given.detach().reshape(-1, given.shape[-1]), gradient)
        _, _, needs_given, _, needs_bias = ctx.needs_input_grad
        passed = (gradient @ (weight.T if ctx.turned else weight)).view(given.shape) if needs_given else None
        return None, None, passed, None, gradient.sum(0) if needs_bias else None


class _Lookup(torch.autograd.Function):
    """A table of tokens that hands out the gradient of what is looked up."""

    @staticmethod
    def forward(ctx: Any, keep: Keep, indices: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.keep = keep
        ctx.save_for_backward(indices)
        return functional.embedding(indices, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.keep(ctx.saved_tensors[0], gradients[0])
        return None, None, None, None


_HANDLERS: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: Uses._linear,
    torch.addmm: Uses._addmm,
    functional.embedding: Uses._embedding,
}
