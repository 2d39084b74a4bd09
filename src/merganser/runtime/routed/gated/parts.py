"""Parts of a linear layer: what each task adds to its weight, whole, sparse or of low rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from ....errors import CheckpointError
from ....ops.linalg.spectral import svd
from ..tasks import Factors, TaskSet, Weights
from .settings import GateSettings

__all__ = ["Part", "collect_parts", "task_tensor"]


@dataclass(frozen=True, slots=True)
class Part:
    """What the tasks add to one linear layer; its weight has the shape [out, in].

    Args:
        tasks: Number of tasks.
        down: Right factors of all tasks, one below the other, shape [tasks * r, in]; None where parts are not of low rank.
        up: Left factors, one beside the other, shape [out, tasks * r].
        whole: Weights, one below the other, shape [tasks * out, in], dense or in compressed sparse rows (float32); None
            where parts are of low rank.
        bias: What is added to the bias, shape [tasks, out]; None where it is nothing.
    """

    tasks: int
    down: Tensor | None = None
    up: Tensor | None = None
    whole: Tensor | None = None
    bias: Tensor | None = None

    def outputs(self, x: Tensor) -> Tensor:
        """Return what each task adds to the output.

        Args:
            x: Inputs, shape [..., in].

        Returns:
            Shape [..., tasks, out].
        """
        if self.whole is not None:
            found = _product(x, self.whole).view(*x.shape[:-1], self.tasks, -1)
        else:
            _, up = self._factors()
            found = torch.einsum("...kr,okr->...ko", self.codes(x), up.view(len(up), self.tasks, -1))
        return found if self.bias is None else found + self.bias

    def mixed(self, x: Tensor, gates: Tensor) -> Tensor:
        """Return the weighted sum of what the tasks add.

        Args:
            x: Inputs, shape [..., in].
            gates: Weights of the tasks, shape [..., tasks].

        Returns:
            Shape [..., out].
        """
        if self.whole is not None:
            return (self.outputs(x) * gates.unsqueeze(-1)).sum(-2)
        _, up = self._factors()
        found = linear((self.codes(x) * gates.unsqueeze(-1)).flatten(-2), up)
        return found if self.bias is None else found + gates @ self.bias

    def codes(self, x: Tensor) -> Tensor:
        """Return the inputs times the right factors of each task, of parts of low rank, shape [..., tasks, r]."""
        down, _ = self._factors()
        return linear(x, down).view(*x.shape[:-1], self.tasks, -1)

    def _factors(self) -> tuple[Tensor, Tensor]:
        assert self.down is not None
        assert self.up is not None
        return self.down, self.up

    def to(self, dtype: torch.dtype, device: torch.device) -> Part:
        """Return the part in another dtype and on another device; sparse weights stay in float32."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.to(device) if tensor.layout == torch.sparse_csr else tensor.to(device, dtype)

        return replace(self, down=moved(self.down), up=moved(self.up), whole=moved(self.whole), bias=moved(self.bias))

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored of the part, by name."""
        found = {"down": self.down, "up": self.up, "bias": self.bias}
        whole = self.whole
        if whole is not None and whole.layout == torch.sparse_csr:
            size = torch.tensor(whole.shape)
            found |= {
                "rows": whole.crow_indices(),
                "columns": whole.col_indices(),
                "values": whole.values(),
                "size": size,
            }
        else:
            found["whole"] = whole
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tasks: int, tensors: Mapping[str, Tensor]) -> Part:
        """Make a part of what `tensors` returned.

        Raises:
            KeyError: A tensor is missing.
            RuntimeError: Shapes do not fit.
        """
        whole = tensors.get("whole")
        if "values" in tensors:
            whole = _compressed(tensors["rows"], tensors["columns"], tensors["values"], tensors["size"].tolist())
        if whole is None and not {"down", "up"} <= tensors.keys():
            raise KeyError("down, up or whole")
        return cls(tasks, tensors.get("down"), tensors.get("up"), whole, tensors.get("bias"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if weight.layout != torch.sparse_csr:
        return linear(x, weight)
    # sparse products are in float32, whatever the dtype of the model
    flat = x.reshape(-1, x.shape[-1]).float()
    found: Tensor = torch.sparse.mm(weight, flat.T).T
    return found.reshape(*x.shape[:-1], -1).to(x.dtype)


def collect_parts(
    tasks: TaskSet, shared: Mapping[str, Tensor], layers: Iterable[str], settings: GateSettings
) -> tuple[dict[str, Part], int]:
    """Compute the parts of linear layers: the weight of each task minus that of the shared model.

    Args:
        tasks: The tasks.
        shared: Tensors of the shared model, by name.
        layers: Names of linear layers.
        settings: How parts are made smaller.

    Returns:
        The parts by layer, without those that no task changes; and how many other tensors tasks have that are not those of
        the shared model, which are not used.

    Raises:
        CheckpointError: A task has no such layer, or another shape.
    """
    weights = {task: tasks.weights(task) for task in tasks.tasks}
    found: dict[str, Part] = {}
    used: set[str] = set()
    for layer in layers:
        name = f"{layer}.weight"
        if all(name in own.shared for own in weights.values()):
            continue
        base = shared[name].float()
        changes = [_change(tasks, task, own, name, base, settings) for task, own in weights.items()]
        bias = _biases(list(weights.values()), f"{layer}.bias", shared)
        used |= {name, f"{layer}.bias"}
        part = _joined(changes, base.shape, bias, sparse=settings.density is not None)
        if part is not None:
            found[layer] = part
    others = {name for own in weights.values() for name in own if name not in own.shared} - used
    return found, len(others)


def task_tensor(tasks: TaskSet, task: str, name: str, base: Tensor) -> Tensor:
    """Return a tensor of a task.

    Args:
        tasks: The tasks.
        task: Its name.
        name: Name of the tensor.
        base: That of the shared model.

    Raises:
        CheckpointError: The task has no such tensor, or another shape.
    """
    weights = tasks.weights(task)
    if name not in weights:
        raise CheckpointError(f"{tasks.name}: task {task!r} has no tensor {name}")
    found = weights[name]
    if found.shape != base.shape:
        raise CheckpointError(
            f"{tasks.name}: {name} is {list(found.shape)} in task {task!r}, and {list(base.shape)} in the shared model"
        )
    return found


_Change = Factors | Tensor
"""What a task adds to a weight: left and right factors, or the whole."""


def _change(tasks: TaskSet, task: str, weights: Weights, name: str, base: Tensor, settings: GateSettings) -> _Change:
    if name in weights.shared:
        return base.new_zeros(base.shape[0], 0), base.new_zeros(0, base.shape[1])
    factors = tasks.factors(task, name)
    if factors is not None and not settings.reduced:
        return factors
    delta = task_tensor(tasks, task, name, base).float()
    delta -= base
    if settings.rank is not None:
        cut = svd(delta, settings.rank)
        return cut.left * cut.values.to(cut.left.dtype), cut.right.T.contiguous()
    if settings.density is not None:
        kept = max(1, round(settings.density * delta.numel()))
        flat = delta.flatten()
        places = flat.abs().topk(kept).indices
        return torch.zeros_like(flat).index_copy_(0, places, flat[places]).view_as(delta)
    return delta


def _joined(changes: Sequence[_Change], shape: torch.Size, bias: Tensor | None, *, sparse: bool) -> Part | None:
    """Put the changes of all tasks into one part; None where there is no change."""
    count = len(changes)
    low = [change for change in changes if isinstance(change, tuple)]
    if len(low) == count:
        rank = max(right.shape[0] for _, right in low)
        if rank == 0:
            if bias is None:
                return None
            rank = 1
        up, down = torch.zeros(shape[0], count, rank), torch.zeros(count, rank, shape[1])
        for task, (left, right) in enumerate(low):
            up[:, task, : left.shape[1]] = left
            down[task, : right.shape[0]] = right
        return Part(count, down.flatten(0, 1), up.flatten(1), None, bias)
    dense = torch.cat([change[0] @ change[1] if isinstance(change, tuple) else change for change in changes])
    if bias is None and not bool(dense.any()):
        return None
    if not sparse:
        return Part(count, whole=dense, bias=bias)
    rows, columns = dense.nonzero(as_tuple=True)
    starts = torch.zeros(len(dense) + 1, dtype=torch.int32)
    starts[1:] = rows.bincount(minlength=len(dense)).cumsum(0)
    return Part(count, whole=_compressed(starts, columns.int(), dense[rows, columns], dense.shape), bias=bias)


def _compressed(starts: Tensor, columns: Tensor, values: Tensor, size: Sequence[int]) -> Tensor:
    with warnings.catch_warnings():
        # torch calls its sparse rows a beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values, tuple(size), check_invariants=True)


def _biases(weights: Sequence[Weights], name: str, shared: Mapping[str, Tensor]) -> Tensor | None:
    if name not in shared:
        return None
    base = shared[name].float()
    found = torch.stack([own[name].float() - base if name not in own.shared else base * 0 for own in weights])
    return found if bool(found.any()) else None
