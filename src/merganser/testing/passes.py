"""How the passes of a method over its inputs are computed, found out by running it on small tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..engine.fusion.machine import why_not
from ..engine.kernels.block import Block
from ..engine.kernels.blocks import TensorRun
from ..engine.kernels.kernels import Kernel, Kernels, Phase
from ..engine.kernels.values import Values
from ..method import Location, MergeMethod
from ..method.method import fill
from ..ops.random import keys
from .cases import cases, count_models, make_inputs

if TYPE_CHECKING:
    from ..engine.fusion.run import Program

__all__ = ["Pass", "passes"]

_SHAPE, _BLOCK = (6, 32), 64


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the inputs.

    Args:
        what: What it does: "measures NAME", with the number of the round where there are several, or "merges".
        fused: Whether its operations are fused into loops.
        between: Operations on elements that torch runs by themselves, in any of the cases tried.
        reason: Why it is not fused, in the first such case.
    """

    what: str
    fused: bool
    between: tuple[str, ...] = ()
    reason: str = ""


def passes(method: MergeMethod) -> list[Pass]:
    """Return the passes of a method, with the parameters of the contract suite; only float32 is tried."""
    if not method.fuse:
        return [Pass("merges", False, reason=f"a function over a whole {method.scope} gains nothing from that")]
    if reason := why_not():
        return [Pass("merges", False, reason=reason)]
    between: dict[Phase, dict[str, None]] = {}
    reasons: dict[Phase, str] = {}
    for phase, found in _made(method):
        own = between.setdefault(phase, {})
        if isinstance(found, str):
            reasons.setdefault(phase, found)
        else:
            own.update(dict.fromkeys(found.between))
    order = {("measure", name, i): None for name, own in method.statistics.items() for i in range(len(own.rounds))}
    return [
        Pass(_what(method, phase), phase not in reasons, tuple(between[phase]), reasons.get(phase, ""))
        for phase in [*order, ("combine", "", 0)]
        if phase in between
    ]


class _Watched(Kernels):
    """Kernels that run operation by operation, and enter which programs fused ones would be."""

    made: dict[Phase, Program | str]

    def kernel(self, phase: Phase, block: Block) -> Kernel:
        self.made[phase] = self.program(phase, block)
        return super().kernel(phase, block)


def _made(method: MergeMethod) -> Iterator[tuple[Phase, Program | str]]:
    """Merge small tensors with several settings; yield phases and their programs, or why there is none."""
    n = count_models(method)
    for with_base, parameters in cases(method):
        base, models = make_inputs(method, with_base, _SHAPE)
        filled = fill(method, parameters, n)
        values = Values.of(method, filled, method.locate(filled, Location("layer", 7, 32)))
        kernels = _Watched(method, values.static, torch.float32, torch.float32, torch.device("cpu"))
        kernels.made = {}
        run = TensorRun(kernels, values, _SHAPE, keys(0, "tensor", n), _BLOCK)
        flat = [tensor.reshape(-1) for tensor in models]

        def read(start: int, end: int, base=base, flat=flat):  # type: ignore[no-untyped-def]  # bound to this case
            return None if base is None else base.reshape(-1)[start:end], [own[start:end] for own in flat]

        known = run.solve_statistics(read, lambda _: None)
        run.combine(known, run.ranges[0], *read(*run.ranges[0]))
        yield from kernels.made.items()


def _what(method: MergeMethod, phase: Phase) -> str:
    kind, name, index = phase
    if kind == "combine":
        return "merges"
    count = len(method.statistics[name].rounds)
    return f"measures {name}" + (f", {index + 1} of {count}" if count > 1 else "")
