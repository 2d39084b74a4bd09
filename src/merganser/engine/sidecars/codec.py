"""Encode one tensor into stored parts, and decode a task's tensor from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...method import MergeMethod, Part, Sidecar, Statistic, takes
from ..kernels.assignment import is_matrix
from ..kernels.blocks import BLOCK
from ..kernels.values import Values

T = TypeVar("T")

OWN = "own"
"""Name of the part that is a copy of the task's tensor."""

Stored = Mapping[str, Tensor | Sequence[Tensor]]
"""Parts of a block by name, in their stored dtypes: one shared tensor, or one tensor per model."""


@dataclass(frozen=True, slots=True)
class Span:
    """A block of a tensor, as a sidecar's functions receive it.

    Args:
        start: Index of its first element.
        end: Index after its last element.
        shape: Its shape.
    """

    start: int
    end: int
    shape: tuple[int, ...]


class Lazily(Sequence[Tensor]):
    """A sequence of tensors that are read on access.

    Args:
        read: Returns the tensor at an index.
        count: Number of tensors.
    """

    def __init__(self, read: Callable[[int], Tensor], count: int) -> None:
        self._read = read
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._read(index)


def sidecar_of(method: MergeMethod) -> Sidecar:
    """Return a method's sidecar; the method must have one."""
    assert method.sidecar is not None
    return method.sidecar


def keeps(
    method: MergeMethod, parameters: Mapping[str, Any], name: str, shape: Sequence[int], role: str | None
) -> str | None:
    """Return how a tensor without parts is restored: "own" or "merged" (see `SidecarPlan`); None if it has parts.

    Args:
        method: A method with a sidecar.
        parameters: Parameters of the tensor, by their names in recipes.
        name: Name of the tensor.
        shape: Its shape.
        role: Its role, from `anatomy`; None if unknown.
    """
    if not math.prod(shape):
        return "merged"
    if parameters["keep"] != "parts":
        return str(parameters["keep"])
    if not sidecar_of(method).matrices or is_matrix(name, shape, role, tables=parameters["embeddings"] == "matrix"):
        return None
    return str(parameters["others"])


class Codec:
    """The sidecar of a method for one tensor.

    Args:
        method: A method with a sidecar.
        parameters: Parameters of the tensor, by their names in recipes.
        shape: Shape of the tensor.
        n_models: Number of models.
        block: Most elements per block; a multiple of 8.
        device: Where encoding and decoding run.
    """

    def __init__(
        self,
        method: MergeMethod,
        parameters: Mapping[str, Any],
        shape: tuple[int, ...],
        n_models: int,
        *,
        block: int = BLOCK,
        device: torch.device | None = None,
    ) -> None:
        self.sidecar = sidecar_of(method)
        self._method = method
        self._shape = shape
        self._n_models = n_models
        self._block = block
        self._device = device or torch.device("cpu")
        self._values = Values.of(method, parameters)
        self._per_model = {p.argument for p in method.parameters.values() if p.per_model}
        self._parameters = parameters
        self._parts: dict[tuple[int, ...], Mapping[str, Part]] = {}

    @cached_property
    def statistics(self) -> list[tuple[str, Statistic, str]]:
        """Statistics that this tensor needs: name, declaration, "tensor" or "model"."""
        return [
            (name, statistic, statistic.where(self._parameters))
            for name, statistic in self.sidecar.statistics.items()
            if statistic.wanted(self._parameters)
        ]

    @cached_property
    def blocks(self) -> list[Span]:
        """The blocks of the tensor."""
        return list(spans(self._shape, self.sidecar.scope, self._block))

    @property
    def largest_block(self) -> Span:
        """The first block; none is larger. Planning needs only this one, as a large tensor may have millions."""
        return next(spans(self._shape, self.sidecar.scope, self._block))

    def parts(self, shape: tuple[int, ...]) -> Mapping[str, Part]:
        """Return the declared parts of a block of a shape, by name."""
        if shape not in self._parts:
            given = {"shape": shape, "n_models": self._n_models, **self._settings()}
            self._parts[shape] = _call(self.sidecar.parts, given)
        return self._parts[shape]

    @cached_property
    def all_parts(self) -> dict[str, Part]:
        """Return the declaration of everything stored for the whole tensor: its parts and statistics."""
        if self.sidecar.scope == "matrix":
            *packed, rows, columns = self._shape
            each = self.parts((rows, columns))
            parts = {name: replace(part, shape=(*packed, *part.shape)) for name, part in each.items()}
        else:
            parts = dict(self.parts(_whole(self._shape, self.sidecar.scope)))
        return parts | {name: Part((), "float64") for name, _, _ in self.statistics}

    def measure(
        self, name: str, index: int, base: Tensor, models: Sequence[Tensor], merged: Tensor, known: Mapping[str, Tensor]
    ) -> Tensor:
        """Measure round `index` of statistic `name` on a block; the result is on the CPU, float64 or int64."""
        measure = self.sidecar.statistics[name].rounds[index].measure
        given = {"base": base, "models": models, "merged": merged, "size": math.prod(self._shape)}
        given |= {**self._settings(), **self._sent(known, base)}
        measured: Tensor = _call(measure, given)
        return measured.cpu()

    def solve(self, name: str, index: int, total: Tensor, known: dict[str, Tensor], size: int) -> None:
        """Solve a round, and store its result in `known`: as `previous`, or after the last round under its name."""
        statistic = self.sidecar.statistics[name]
        solve = statistic.rounds[index].solve
        first, *rest = takes(solve)
        given = {**self._settings(), **known, "size": torch.tensor(size, dtype=torch.float64)}
        known["previous"] = solve(**{first: total}, **{key: given[key] for key in rest})
        if index == len(statistic.rounds) - 1:
            known[name] = known.pop("previous").double()

    def solve_statistics(
        self, over: Collection[str], measure: Callable[[str, int], Tensor], known: dict[str, Tensor], size: int
    ) -> None:
        """Measure and solve statistics one after another, and store them in `known`.

        Args:
            over: Which statistics: those over the "tensor", over the "model", or both.
            measure: Returns the measurement of round `index` of statistic `name`, summed over all blocks.
            known: Statistics solved before, by name.
            size: Number of measured elements.
        """
        for name, statistic, where in self.statistics:
            for index in range(len(statistic.rounds)) if where in over else ():
                self.solve(name, index, measure(name, index), known, size)

    def encode(
        self,
        block: Span,
        base: Tensor,
        models: Sequence[Tensor],
        merged: Tensor,
        known: Mapping[str, Tensor],
        dtypes: Sequence[torch.dtype],
    ) -> Stored:
        """Encode a block into its parts.

        Args:
            block: The block.
            base: The base's block, in the compute dtype and the block's shape.
            models: The models' blocks; each is read on access.
            merged: The merged model's block, as written.
            known: Solved statistics.
            dtypes: Dtype of the tensor in the merged model, then in each task's model.

        Returns:
            The parts, flat, on the CPU, rounded to their stored dtypes.
        """
        given = {"base": base, "models": models, "merged": merged, **self._settings(), **self._sent(known, base)}
        encoded = _call(self.sidecar.encode, given)
        stored: dict[str, Tensor | list[Tensor]] = {}
        for name, part in self.parts(block.shape).items():
            encoded_part = encoded[name]
            if isinstance(encoded_part, Tensor):
                stored[name] = _stored(name, part, encoded_part, dtypes[0])
            else:
                each = zip(encoded_part, dtypes[1:], strict=True)
                stored[name] = [_stored(name, part, tensor, dtype) for tensor, dtype in each]
        return stored

    def decode(
        self, block: Span, task: int, base: Tensor | None, merged: Tensor, stored: Mapping[str, Tensor]
    ) -> Tensor:
        """Decode a task's block from its parts, in the compute dtype.

        Args:
            block: The block.
            task: Position of the task's model.
            base: The base's block, in the compute dtype and the block's shape; None if it is not needed.
            merged: The merged model's block, likewise.
            stored: Stored parts of the block, the task's and the shared ones, and the task's statistics.
        """
        given = {"base": base, "merged": merged, **self._settings(task)}
        given |= self._read_parts(block, stored, merged.dtype)
        given |= self._sent({name: stored[name] for name, _, _ in self.statistics}, merged)
        restored: Tensor = _call(self.sidecar.decode, given)
        return restored

    def factors(
        self, block: Span, task: int, stored: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the low-rank factors of a task's matrix, shapes [rows, k] and [k, columns]; the sidecar declares them."""
        assert self.sidecar.factors is not None
        given = {"shape": block.shape, **self._settings(task), **self._read_parts(block, stored, dtype)}
        return _call(self.sidecar.factors, given)

    def _read_parts(self, block: Span, stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the parts of a block in their shapes, floats in the dtype of the arithmetic."""
        shaped = {
            name: stored[name].reshape(part.shape).to(self._device) for name, part in self.parts(block.shape).items()
        }
        return {name: part.to(dtype) if part.is_floating_point() else part for name, part in shaped.items()}

    def _settings(self, task: int | None = None) -> dict[str, Any]:
        """Return the parameters by argument name; for a task, with its own value of each per-model parameter."""

        def own(name: str, value: Any) -> Any:
            return value[task] if task is not None and name in self._per_model else value

        return {name: own(name, value) for name, value in {**self._values.static, **self._values.numbers}.items()}

    def _sent(self, known: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Return statistics on the device of `like`, floats in its dtype."""
        return {
            name: value.to(like.device, like.dtype if value.is_floating_point() else None)
            for name, value in known.items()
        }


def spans(shape: tuple[int, ...], scope: str, block: int = BLOCK) -> Iterator[Span]:
    """Cut a tensor into blocks of a multiple of 8 elements, so that one bit per element fills whole bytes.

    Args:
        shape: Shape of the tensor, not empty.
        scope: "element", "row" or "matrix".
        block: Most elements per block, unless the scope needs more; a multiple of 8.
    """
    size = math.prod(shape)
    columns = shape[-1] if shape else 1
    if scope == "matrix":
        step, form = shape[-2] * columns, shape[-2:]
    elif scope == "row":
        step, form = max(block // (8 * columns), 1) * 8 * columns, (-1, columns)
    else:
        step, form = block, (-1,)
    for start in range(0, size, step):
        end = min(start + step, size)
        yield Span(start, end, tuple((end - start) // columns ** (len(form) - 1) if n < 0 else n for n in form))


def _whole(shape: tuple[int, ...], scope: str) -> tuple[int, ...]:
    """Return the shape of a tensor as one block."""
    size = math.prod(shape)
    return (size // shape[-1], shape[-1]) if scope == "row" and shape else (size,)


def _stored(name: str, part: Part, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a part in its stored form; assert that its shape is as declared."""
    wanted = dtype if part.dtype is None else getattr(torch, part.dtype)
    assert tuple(tensor.shape) == part.shape, f"{name}: {list(tensor.shape)} instead of the declared {list(part.shape)}"
    return tensor.detach().to("cpu", wanted).reshape(-1).contiguous()


def _call(function: Callable[..., T], given: Mapping[str, Any]) -> T:
    return function(**{name: given[name] for name in _taken(function)})


@lru_cache(maxsize=256)
def _taken(function: Callable[..., Any]) -> tuple[str, ...]:
    return takes(function)


class Codecs:
    """The codecs of a method; tensors of one shape with the same parameters share a codec.

    Args:
        method: A method with a sidecar.
        n_models: Number of models.
        device: Where encoding and decoding run.
    """

    def __init__(self, method: MergeMethod, n_models: int, device: torch.device | None = None) -> None:
        self._method = method
        self._n_models = n_models
        self._device = device
        self._known: dict[tuple[int, tuple[int, ...]], Codec] = {}

    def of(self, parameters: Mapping[str, Any], shape: tuple[int, ...]) -> Codec:
        """Return the codec for a shape and parameters; callers keep the parameters alive, as their `id` is the key."""
        key = id(parameters), shape
        codec = self._known.get(key)
        if codec is None:
            codec = self._known[key] = Codec(self._method, parameters, shape, self._n_models, device=self._device)
        return codec
