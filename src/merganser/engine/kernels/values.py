"""The parameters of a tensor, as kernels take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...method import MergeMethod


@dataclass(frozen=True)
class Values:
    """Parameters of one output tensor, in the forms that kernels and solvers take.

    Args:
        static: Flags, counts and choices, and which statistics are wanted ("measure NAME").
        numbers: Numeric parameters, and numbers derived from the tensor's location, float64: 0-d, or shape [T].
        together: How tensors with these parameters may be merged at once, as in `MergeMethod.together`.
    """

    static: Mapping[str, Any]
    numbers: Mapping[str, Tensor]
    together: Literal["joined", "stacked"] | None = None

    @classmethod
    def of(
        cls,
        method: MergeMethod,
        parameters: Mapping[str, Any],
        located: Mapping[str, float | Sequence[float]] | None = None,
    ) -> Values:
        """Sort resolved parameters, by names in recipes, into both kinds; add numbers derived from the location."""
        static: dict[str, Any] = {}
        numbers: dict[str, Tensor] = {}
        for name, value in parameters.items():
            parameter = method.parameters[name]
            if parameter.kind == "number":
                numbers[parameter.argument] = torch.tensor(value, dtype=torch.float64)
            else:
                static[parameter.argument] = value
        numbers.update({name: torch.tensor(value, dtype=torch.float64) for name, value in (located or {}).items()})
        static.update({f"measure {name}": s.wanted(parameters) for name, s in method.statistics.items()})
        return cls(static, numbers, method.together(parameters))
