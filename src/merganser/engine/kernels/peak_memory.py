"""Measure how much memory a method needs, by running it on small tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...method import MergeMethod
from .data import PerModel
from .merge_tensor import merge_tensor

_ELEMENTS = 1 << 13
_LEAST = 24
_MOST = 1024
"""Longest side of the small tensors: time is cubic in it for methods that compare rows of a matrix with each other."""


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are created inside a `with` block, on this thread.

    Attributes:
        live: Bytes that are held now.
        peak: The most that were held at a time, bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # nothing is compiled in here, and skipping would import the compiler: 75 MB
        return False

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor, nor others that share its memory."""
        self._hold(tensor, 0)

    def _hold(self, tensor: Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        self._held[storage._cdata] = (StorageWeakRef(storage), nbytes)  # type: ignore[no-untyped-call]
        self.live += nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the tensors that it creates."""
        result = func(*args, **(kwargs or {}))
        gone = [key for key, (held, _) in self._held.items() if held.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            self.live -= self._held.pop(key)[1]
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._held:
                self._hold(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live + _workspace(func, args, result))
        return result


def _workspace(func: Any, args: Sequence[Any], result: Any) -> int:
    """Return the size of LAPACK's workspace in an operation, bytes, from its documentation and measurements."""
    kind = func.overloadpacket.__name__
    if kind not in ("_linalg_svd", "_linalg_eigh"):
        return 0
    rows, columns = args[0].shape[-2:]
    factors = result[-1].numel() > 0
    if kind == "_linalg_svd":
        # besides the factors: a copy of the matrix, and gesdd's workspace
        elements = rows * columns + (4 * min(rows, columns) ** 2 if factors else 0)
    else:
        # syevd's workspace, or a copy of the matrix
        elements = 2 * columns**2 if factors else columns**2
    return int(elements * args[0].element_size())


def peak_per_element(
    method: MergeMethod,
    parameters: Mapping[str, Any],
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    output: torch.dtype,
    compute: torch.dtype,
    *,
    with_base: bool,
    fused: bool = False,
) -> float:
    """Return a method's peak memory besides its inputs, bytes per element of the tensor.

    The method runs, with these parameters, on random numbers in a small tensor of the same proportions.

    Args:
        method: The merge method.
        parameters: Its parameters, by their names in recipes.
        shape: Shape of the tensor, or of one matrix if the method works on matrices.
        dtypes: Dtypes of the inputs, the base first.
        output: Dtype of the result.
        compute: Dtype of the arithmetic.
        with_base: Whether the first input is the base.
        fused: Whether operations are fused; loops need no memory.
    """
    fixed = tuple(sorted(parameters.items()))
    return _measure(method, fixed, _smaller(shape), tuple(dtypes), output, compute, with_base, fused)


def _smaller(shape: Sequence[int]) -> tuple[int, ...]:
    """Shrink a shape, in proportion.

    Each dimension stays large enough for operations whose size depends on the number of models.
    """
    sides = sum(size > 1 for size in shape)
    factor = min((_ELEMENTS / max(math.prod(shape), 1)) ** (1 / max(sides, 1)), 1.0)
    return tuple(min(size, _MOST, max(round(size * factor), _LEAST)) for size in shape)


@lru_cache(maxsize=512)
def _measure(
    method: MergeMethod,
    parameters: tuple[tuple[str, Any], ...],
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    output: torch.dtype,
    compute: torch.dtype,
    with_base: bool,
    fused: bool,
) -> float:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    models = [(start + 0.1 * torch.randn(shape, generator=generator)).to(dtype) for dtype in dtypes[with_base:]]
    base = start.to(dtypes[0]) if with_base else None
    memory = PeakMemory()
    for tensor in models if base is None else [base, *models]:
        memory.ignore(tensor)
    data = {
        name: PerModel(
            1 if own.of in ("base", "first") else len(models),
            # any group but the first may not exist
            lambda _, own=own: torch.full(own.shape(shape), float(own.statistic != "groups")),  # type: ignore[misc]
        )
        for name, own in method.from_data.items()
    }
    run = partial(
        merge_tensor,
        method,
        base,
        models,
        dict(parameters),
        dtype=output,
        compute=compute,
        fused=fused,
        allow_nonfinite=True,
        data=data,
    )
    if fused:
        # makes the loops
        run()
    with memory:
        run()
    return memory.peak / max(math.prod(shape), 1)
