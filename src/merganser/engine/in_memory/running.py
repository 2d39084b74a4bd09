"""Averages of checkpoints that are updated while a model trains, without keeping the checkpoints."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...checkpoint.wrappers import unwrapped_names
from ...errors import CheckpointError, NonFiniteError, ParameterError
from .state_dicts import State, state_dict_of

__all__ = ["EMA", "LAWA", "Average"]


class _Running:
    """What running averages share: names, shapes and dtypes of the first state dict, and its tensors of integers."""

    def __init__(self) -> None:
        self.count = 0
        self._names: dict[str, str] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._integers: dict[str, Tensor] = {}

    def _take(self, state: State | nn.Module) -> dict[str, Tensor]:
        """Return the floating-point tensors by name, and keep the newest of the others.

        Raises:
            CheckpointError: Names or shapes are not those of the first state dict.
            TypeError: It is neither a state dict nor a module.
        """
        where = f"state dict {self.count + 1}"
        given = state_dict_of(state, where)
        names, _ = unwrapped_names(where, given)
        tensors = {new: given[name].detach() for name, new in names.items()}
        if not self.count:
            self._names = {new: name for name, new in names.items()}
            self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
            self._dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        odd = sorted(tensors.keys() ^ self._names.keys())
        if odd:
            raise CheckpointError(f"{where}: different names: {', '.join(odd[:4])}")
        for name, tensor in tensors.items():
            if tensor.shape != self._shapes[name]:
                raise CheckpointError(f"{where}: {name}: shape {[*tensor.shape]}, before {[*self._shapes[name]]}")
            if tensor.is_floating_point() != self._dtypes[name].is_floating_point:
                raise CheckpointError(f"{where}: {name}: {tensor.dtype}, before {self._dtypes[name]}")
        self._integers = {name: t.clone() for name, t in tensors.items() if not t.is_floating_point()}
        self.count += 1
        return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}

    def _divided(self, totals: Mapping[str, Tensor], divisor: float) -> dict[str, Tensor]:
        """Return the state dict: totals divided, in the first dtypes and under the first names."""
        if not self.count:
            raise ParameterError(f"{type(self).__name__}: update it with a state dict first")
        averaged = {name: (total / divisor).to(self._dtypes[name]) for name, total in totals.items()}
        for name, tensor in averaged.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{type(self).__name__}: {name}: the average is not finite ({tensor.dtype})")
        averaged |= {name: tensor.clone() for name, tensor in self._integers.items()}
        return {given: averaged[name] for name, given in self._names.items()}


def _wide(tensor: Tensor) -> Tensor:
    """Return a copy in the dtype of the arithmetic: float64 for float64, else float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


class Average(_Running):
    """A running average, such as of checkpoints along a training run or of the models of a sweep.

        average = merganser.Average()
        for checkpoint in checkpoints:
            average.update(torch.load(checkpoint))
        model.load_state_dict(average.state_dict())

    It holds one sum, in float32 (float64 for float64 tensors), on the device of the tensors. With equal weights the result
    has the bits of `merge_state_dicts("linear", checkpoints, weight=1.0)`. DTensors stay sharded. Integers, such as
    BatchNorm's counter, are those of the latest state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self._totals: dict[str, Tensor] = {}
        self._weight = 0.0

    def update(self, state: State | nn.Module, weight: float = 1.0) -> None:
        """Add a state dict, or that of a module.

        Args:
            state: Names to tensors; they are not kept.
            weight: Its share.

        Raises:
            CheckpointError: Names or shapes are not those of the first state dict.
            TypeError: It is neither a state dict nor a module.
        """
        with torch.no_grad():
            for name, tensor in self._take(state).items():
                part = _wide(tensor).mul_(weight)
                self._totals[name] = self._totals[name].add_(part) if name in self._totals else part
        self._weight += weight

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average: new tensors under the names and in the dtypes of the first state dict.

        Raises:
            ParameterError: There was no update, or the weights add up to 0.
            NonFiniteError: A value that was given is NaN or infinite, or the average does not fit the dtype.
        """
        if self.count and not self._weight:
            raise ParameterError("Average: the weights add up to 0")
        return self._divided(self._totals, self._weight)


class EMA(_Running):
    """An exponential moving average of the weights: average = decay * average + (1 - decay) * weights.

        ema = merganser.EMA(0.999)
        for batch in batches:
            step(batch)
            ema.update(model)

    It starts at the first weights and holds one copy of them, in float32 (float64 for float64 tensors).
    """

    def __init__(self, decay: float = 0.999) -> None:
        """Begin an average.

        Args:
            decay: Share that the average keeps at every update, from 0 to 1.

        Raises:
            ParameterError: It is out of range.
        """
        super().__init__()
        self._average: dict[str, Tensor] = {}
        if not 0 <= decay <= 1:
            raise ParameterError(f"EMA: decay must be between 0 and 1, got {decay}")
        self.decay = decay

    def update(self, state: State | nn.Module) -> None:
        """Move the average towards a state dict, or that of a module.

        Raises:
            CheckpointError: Names or shapes are not those of the first state dict.
            TypeError: It is neither a state dict nor a module.
        """
        with torch.no_grad():
            for name, tensor in self._take(state).items():
                if name in self._average:
                    self._average[name].mul_(self.decay).add_(_wide(tensor).mul_(1 - self.decay))
                else:
                    self._average[name] = _wide(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average: new tensors under the names and in the dtypes of the first state dict.

        Raises:
            ParameterError: There was no update.
            NonFiniteError: A value that was given is NaN or infinite, or the average does not fit the dtype.
        """
        return self._divided(self._average, 1.0)


class LAWA(_Running):
    """The average of the latest k state dicts (LAtest Weight Averaging), which it holds in their own dtypes."""

    def __init__(self, k: int = 10) -> None:
        """Begin an average.

        Args:
            k: Number of state dicts that are averaged; all if there were fewer.

        Raises:
            ParameterError: It is less than 1.
        """
        super().__init__()
        if k < 1:
            raise ParameterError(f"LAWA: k must be at least 1, got {k}")
        self._latest: deque[Mapping[str, Tensor]] = deque(maxlen=k)

    def update(self, state: State | nn.Module) -> None:
        """Add a state dict, or that of a module; the oldest of more than k is dropped.

        Raises:
            CheckpointError: Names or shapes are not those of the first state dict.
            TypeError: It is neither a state dict nor a module.
        """
        self._latest.append({name: tensor.clone() for name, tensor in self._take(state).items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average: new tensors under the names and in the dtypes of the first state dict.

        Raises:
            ParameterError: There was no update.
            NonFiniteError: A value that was given is NaN or infinite, or the average does not fit the dtype.
        """
        totals: dict[str, Tensor] = {}
        for latest in self._latest:
            for name, tensor in latest.items():
                totals[name] = totals[name].add_(tensor) if name in totals else _wide(tensor)
        return self._divided(totals, len(self._latest))
