"""Fit coefficients of task vectors, so that a merged block computes what each model's block does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...checkpoint import Reader
from ...engine.plan.plan import Plan
from ...engine.plan.tensor import PlannedTensor
from ...errors import NonFiniteError, RecipeError
from ..forward.forward import call_block
from ..forward.skeleton import Block, Skeleton
from ..forward.stream import Stream
from ..reverse.gradient import Uses
from ..reverse.parameters import Part, block_parameters, find_parts
from ..sums.coefficients import coefficient_sums
from ..sums.taps import Tapped

__all__ = ["Pupil", "fit_block", "planned_coefficients", "sequences_of_step"]


@dataclass(frozen=True)
class Pupil:
    """The data of one of the models, on which the merged block is fitted to the outputs of the model's own block.

    Args:
        merged: Hidden states of the data in the merged model, whose next block is the one to fit.
        own: Hidden states of the same data in the model itself, which has run this block.
    """

    merged: Stream
    own: Stream

    @property
    def counted(self) -> int:
        """Number of tokens that count, in the stack of the block."""
        stack = self.merged.skeleton.blocks[self.merged.state.done].stack
        return sum(int(batch.stacks[stack].counted.sum()) for batch in self.merged.batches)


@dataclass
class _Fitted:
    """One tensor with its coefficients.

    Args:
        name: Its name.
        part: The part of the model's parameter that it fills.
        base: The base's, float32, flat.
        deltas: The task vectors, float32, flat, shape [models, entries].
        raw: The coefficients before the sigmoid, shape [models, chunks].
        start: The first value of the coefficients, of the same shape.
        planned: How it is merged.
    """

    name: str
    part: Part
    base: Tensor
    deltas: Tensor
    raw: Tensor
    start: Tensor
    planned: PlannedTensor

    @classmethod
    def of(cls, planned: PlannedTensor, part: Part, reader: Reader) -> _Fitted:
        assert planned.base is not None
        base = reader.tensor(planned.base).float().flatten()
        deltas = torch.stack([reader.tensor(model).float().flatten() - base for model in planned.models])
        start = float(planned.parameters["start"])
        chunks = min(int(planned.parameters["chunks"]), max(len(base), 1))
        raw = torch.full((len(deltas), chunks), math.log(start / (1 - start)), requires_grad=True)
        return cls(planned.name, part, base, deltas, raw, raw.detach().sigmoid(), planned)

    def value(self) -> Tensor:
        """Return the merged tensor, float32."""
        merged, chunks = self.base.clone(), self.raw.shape[1]
        pieces, parts = merged.tensor_split(chunks), self.deltas.tensor_split(chunks, dim=1)
        for piece, part, own in zip(pieces, parts, self.raw.detach().sigmoid().T, strict=True):
            piece.addmv_(part.T, own)
        return merged.view(self.planned.shape)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the coefficients, shape [models, chunks], given that of the merged tensor."""
        pieces, chunks = gradient.float().flatten().tensor_split(self.raw.shape[1]), self.raw.shape[1]
        parts = self.deltas.tensor_split(chunks, dim=1)
        return torch.stack([part @ piece for part, piece in zip(parts, pieces, strict=True)], dim=1)

    def pulls(self) -> Tensor:
        """Return the sum over the models of how far the coefficients are from the start, mean over the chunks."""
        # against the start as the sigmoid gives it, so that there is no pull at the start
        return (self.raw.sigmoid() - self.start).abs().mean(1).sum()


def fit_block(
    plan: Plan, skeleton: Skeleton, block: Block, made: Mapping[str, Tensor], pupils: Sequence[Pupil]
) -> list[list[Tapped]]:
    """Fit the coefficients of all tensors of a block.

    Args:
        plan: The merge.
        skeleton: The merged model; the block is filled as it is merged without statistics.
        block: The block.
        made: What it is filled with.
        pupils: The data of each model.

    Returns:
        For each model, the coefficients of every tensor.

    Raises:
        RecipeError: Tensors of the block have different steps or weights.
        NonFiniteError: The loss is NaN or infinite.
    """
    parameters = block_parameters(block)
    parts, _ = find_parts(skeleton, block.sources, parameters, lambda name: made[name])
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    chosen = [by_name[name] for name in parts if _has_coefficients(plan, by_name[name])]
    counts = [pupil.counted for pupil in pupils]
    if not chosen:
        return [[] for _ in pupils]
    steps, weight = _settings(plan, block, chosen)
    with Reader() as reader:
        fitted = [_Fitted.of(planned, parts[planned.name], reader) for planned in chosen]
    _Descent(skeleton, block, parameters, fitted, pupils, weight).run(steps)
    return [_results(fitted, k, counts[k]) for k in range(len(pupils))]


def sequences_of_step(plan: Plan) -> int:
    """Return how many sequences of every model a step uses.

    Raises:
        RecipeError: Tensors differ in that.
    """
    found = {int(tensor.parameters["batch"]) for tensor in plan.tensors if _has_coefficients(plan, tensor)}
    if len(found) > 1:
        raise RecipeError(
            f"{plan.recipe.place}: {plan.method.name} divides all data in batches once, and its tensors have a different "
            "batch; give all tensors the same"
        )
    return found.pop() if found else 1


def _has_coefficients(plan: Plan, planned: PlannedTensor) -> bool:
    return planned.method is plan.method and not planned.copy and bool(planned.shape)


def _settings(plan: Plan, block: Block, tensors: Sequence[PlannedTensor]) -> tuple[int, list[float]]:
    """Return the steps and the models' shares in the loss, which all tensors of a block have in common."""
    for key in ("steps", "weight"):
        if len({str(tensor.parameters[key]) for tensor in tensors}) > 1:
            raise RecipeError(
                f"{plan.recipe.place}: {plan.method.name} learns {block.name} as a whole, and its tensors have different "
                f"{key}; give all tensors of a block the same"
            )
    weight = [float(each) for each in tensors[0].parameters["weight"]]
    return int(tensors[0].parameters["steps"]), [each / (sum(weight) or 1.0) for each in weight]


class _Descent:
    """Adam over the coefficients of a block: gradients of its weights, and from them those of the coefficients."""

    def __init__(
        self,
        skeleton: Skeleton,
        block: Block,
        parameters: Mapping[str, nn.Parameter],
        fitted: Sequence[_Fitted],
        pupils: Sequence[Pupil],
        weight: Sequence[float],
    ) -> None:
        self._skeleton = skeleton
        self._block = block
        self._fitted = fitted
        self._pupils = pupils
        self._weight = weight
        used = {own.part.parameter for own in fitted}
        self._parameters = {name: each for name, each in parameters.items() if name in used}

    def run(self, steps: int) -> None:
        """Lower the loss."""
        units = [self._unit(pupil, steps) for pupil in self._pupils]
        groups = [{"params": [own.raw], "lr": float(own.planned.parameters["rate"])} for own in self._fitted]
        optimiser = torch.optim.Adam(groups)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for step in range(steps):
            gradients = self._gradients(step, units)
            optimiser.zero_grad()
            with torch.enable_grad():
                total = torch.zeros(())
                for own in self._fitted:
                    found = own.gradient(own.part.of(gradients[own.part.parameter]))
                    pull = float(own.planned.parameters["regulariser"]) / len(self._fitted)
                    total = total + (found * own.raw.sigmoid()).sum() + pull * own.pulls()
                torch.autograd.backward(total)
            optimiser.step()
            falling.step()
            for own in self._fitted:
                place = own.part.of(self._parameters[own.part.parameter].data)
                place.copy_(own.value())

    def _gradients(self, step: int, units: Sequence[float]) -> dict[str, Tensor]:
        """Return the gradient of the loss of one batch of each model, by parameter, float32."""
        found = {name: torch.zeros(own.shape) for name, own in self._parameters.items()}
        for own in self._parameters.values():
            own.requires_grad_(True)
        for pupil, unit, weight in zip(self._pupils, units, self._weight, strict=True):
            if not weight:
                continue
            uses = Uses(self._parameters)
            with torch.enable_grad():
                with uses:
                    error, _ = self._error(pupil, step % len(pupil.merged.batches))
                if error is None:
                    continue
                grown = torch.autograd.grad(error * (weight / unit), list(self._parameters.values()), allow_unused=True)
            uses.add({name: own for name, own in zip(self._parameters, grown, strict=True) if own is not None})
            for name, gradient in uses.gradients.items():
                gradient.add_to(found[name])
        for own in self._parameters.values():
            own.requires_grad_(False)
        return found

    @torch.no_grad()
    def _unit(self, pupil: Pupil, steps: int) -> float:
        """Return the mean squared error at the start over the batches that are used."""
        pairs = [self._error(pupil, number) for number in range(min(steps, len(pupil.merged.batches)))]
        errors = [(float(error), size) for error, size in pairs if error is not None]
        # where the start computes the same as the model, what is left is rounding, and must not be made large
        return max(sum(error for error, _ in errors), 1e-12 * sum(size for _, size in errors), 1e-30) / max(
            len(errors), 1
        )

    def _error(self, pupil: Pupil, number: int) -> tuple[Tensor | None, float]:
        """Return the mean squared error of a batch, and the mean square of the target; None if no token counts."""
        index, stack = pupil.merged.state.done, self._block.stack
        batch = pupil.merged.batches[number]
        counted = batch.stacks[stack].counted
        if not bool(counted.any()):
            return None, 0.0
        target = pupil.own.before(number, pupil.own.state.done)[stack].hidden[counted].float()
        output = call_block(self._skeleton, index, batch, pupil.merged.before(number, index)).hidden[counted].float()
        error = (output - target).square().mean()
        if not bool(error.isfinite()):
            raise NonFiniteError(
                f"{batch.where[0]}: the merged model produces NaN or infinity for this text while {self._block.name} is "
                "fitted; a smaller rate or start may help"
            )
        return error, float(target.square().mean())


def _results(fitted: Iterable[_Fitted], k: int, count: int) -> list[Tapped]:
    values = ((own, own.raw.detach().sigmoid()[k]) for own in fitted)
    return [coefficient_sums(own.name, own.planned.shape, each, count) for own, each in values]


def planned_coefficients(skeleton: Skeleton, block: Block) -> list[Tapped]:
    """Return the coefficients that the tensors of a block will have, without values, as if each were of one chunk."""
    tensors = {name: skeleton.checkpoint.tensors[name] for name in block.sources}
    return [
        coefficient_sums(name, tensor.shape, torch.empty(1), 0)
        for name, tensor in tensors.items()
        if tensor.shape and tensor.dtype.kind == "float"
    ]
