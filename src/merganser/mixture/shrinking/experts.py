"""The experts of one layer in a form that methods work on, whatever the layout of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Experts", "Observed"]


@dataclass(frozen=True)
class Experts:
    """The experts of a layer; a hidden unit is a row of each of their parts.

    Args:
        units: Parts with a row per hidden unit, float32: `gate`, `up` and `down`, shape [experts, units, width] (so
            `down` is transposed), and `gate_bias` and `up_bias`, shape [experts, units, 1].
        output_bias: Bias of the outputs, shape [experts, width]; None without one.
        activate: Computes hidden units of gate and up.
    """

    units: Mapping[str, Tensor]
    output_bias: Tensor | None
    activate: Callable[[Tensor, Tensor], Tensor]

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.units["gate"])

    def hidden(self, expert: int, inputs: Tensor) -> Tensor:
        """Return the hidden units of an expert, shape [tokens, units].

        Args:
            expert: The expert.
            inputs: Shape [tokens, width].
        """
        gate, up = (self._project(name, expert, inputs) for name in ("gate", "up"))
        return self.activate(gate, up)

    def _project(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        found = inputs @ self.units[name][expert].T
        bias = self.units.get(f"{name}_bias")
        return found if bias is None else found + bias[expert, :, 0]

    def outputs(self, expert: int, inputs: Tensor) -> Tensor:
        """Return what an expert computes, shape [tokens, width]; arguments are those of `hidden`."""
        found = self.hidden(expert, inputs) @ self.units["down"][expert]
        return found if self.output_bias is None else found + self.output_bias[expert]

    def chosen(self, experts: Sequence[int]) -> Experts:
        """Return some of the experts."""
        at = list(experts)
        bias = None if self.output_bias is None else self.output_bias[at]
        return replace(self, units={name: part[at] for name, part in self.units.items()}, output_bias=bias)

    def averaged(self, weights: Tensor) -> Experts:
        """Return a single expert, each of whose parts is a weighted sum.

        Args:
            weights: A weight per expert, shape [experts].
        """
        w = weights.float()
        units = {name: torch.einsum("e,euw->uw", w, part)[None] for name, part in self.units.items()}
        bias = None if self.output_bias is None else (w @ self.output_bias)[None]
        return replace(self, units=units, output_bias=bias)

    @classmethod
    def joined(cls, parts: Sequence[Experts]) -> Experts:
        """Return the experts of several, in their order."""
        units = {name: torch.cat([own.units[name] for own in parts]) for name in parts[0].units}
        biases = [own.output_bias for own in parts if own.output_bias is not None]
        return replace(parts[0], units=units, output_bias=torch.cat(biases) if biases else None)


@dataclass(frozen=True)
class Observed:
    """What a layer of experts received and what its router did, for the tokens that count.

    Args:
        inputs: Inputs of router and experts, float32, shape [tokens, width].
        logits: The router's logits, float32, shape [tokens, experts].
        gates: Weights of the experts, zero for those that are not chosen, float32, shape [tokens, experts].
        chosen: Which experts compute each token, bool, shape [tokens, experts].
    """

    inputs: Tensor
    logits: Tensor
    gates: Tensor
    chosen: Tensor

    def of(self, experts: Sequence[int]) -> Observed:
        """Return what concerns some of the experts."""
        at = list(experts)
        return Observed(self.inputs, self.logits[:, at], self.gates[:, at], self.chosen[:, at])

    def usage(self) -> Tensor:
        """Return how many tokens chose each expert, float64, shape [experts]."""
        return self.chosen.double().sum(0)
