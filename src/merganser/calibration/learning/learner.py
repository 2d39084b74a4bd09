"""The steps of the optimiser, the state from which they continue, and what is written at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.plan.plan import Plan
from ...method import Learning, takes
from ...statistics import sum_name
from ..data.batches import Batch
from ..forward.skeleton import Skeleton
from ..forward.stream import Stream
from ..output.target import Target
from ..output.torchfile import load_working, save_working
from ..output.writer import file_name, write_about, write_sums
from ..single.run import Progress, described, without
from ..sums.coefficients import coefficient_sums
from ..within.weights import ModelTensors
from .coefficients import Coefficients, LearntTensors, chosen, settings_of
from .descent import Passes
from .losses import Losses
from .sequences import lined_up, of_step
from .teachers import Teachers

__all__ = ["WORKING", "Learner"]

# no folder of a model begins with a dot
_HIDDEN, _TEACHERS = ".hidden", ".teachers"
# two files in turn, so that a step that is killed half-way still finds what it begins with
_STATES = (".learning-0.pt", ".learning-1.pt")
WORKING = (_HIDDEN, _TEACHERS, *_STATES)
"""Names of what only learning needs."""


class Learner:
    """Adam, or a method's own steps, over the coefficients of all tensors.

    Args:
        plan: The merge.
        skeleton: The merged model.
        coefficients: The coefficients.
        learning: How they are learnt.
        target: Where statistics and the state are written.
        data: The sequences of each model.
        names: Names of the models' folders.
    """

    def __init__(
        self,
        plan: Plan,
        skeleton: Skeleton,
        coefficients: Coefficients,
        learning: Learning,
        target: Target,
        data: Sequence[Sequence[Batch]],
        names: Sequence[str],
    ) -> None:
        self._skeleton = skeleton
        self._coefficients = coefficients
        self._learning = learning
        self._target = target
        self._names = names
        self._tensors = chosen(plan)
        parameters = self._tensors[0].parameters
        self._settings = settings_of(plan.method, parameters)
        self._weight = [float(own) for own in parameters["weight"]]
        self._steps, self._batch = int(parameters["steps"]), int(parameters["batch"])
        # only the sequences that the steps will use; of a model whose weight is 0, none
        used = self._steps * self._batch
        self._data = [own[:used] if weight else [] for own, weight in zip(data, self._weight, strict=True)]
        self._passes = Passes(skeleton, coefficients, LearntTensors(plan, coefficients), target.folder / _HIDDEN)
        self._optimiser = torch.optim.Adam(list(coefficients.values.values()), lr=float(parameters["rate"]))
        self._teachers: Teachers | None = None
        self._done = 0
        self._losses: list[list[float | None]] = []
        self._after: list[float | None] = []

    def open(self, sources: Sequence[ModelTensors]) -> None:
        """Make the folders, or continue an interrupted run.

        Args:
            sources: The weights of each model.
        """
        folder, state = self._target.folder, self._target.state
        self._target.claim([f"{_HIDDEN}/", f"{_TEACHERS}/", *_STATES, *(f"{name}/" for name in self._names)])
        (folder / _HIDDEN).mkdir(exist_ok=True)
        if self._learning.has_teacher:
            folders = [folder / _TEACHERS / name for name in self._names]
            for own in folders:
                own.mkdir(parents=True, exist_ok=True)
            self._teachers = Teachers(self._skeleton, sources, self._data, folders, state.get("teachers"))
        self._done = int(state.get("done", 0))
        if self._done:
            self._restore(folder / _STATES[self._done % 2])

    def run(self, progress: Progress | None) -> None:
        """Take what is left of the steps, and measure the loss once more."""
        if self._teachers is not None:
            self._teachers.run(self._note)
        for step in range(self._done, self._steps):
            if progress is not None:
                progress(step, self._steps)
            self._losses.append(self._step(step))
            self._done = step + 1
            self._note()
        stream, losses = self._forward(0)
        values = [
            float(losses.of(number).of(stream.logits(number), batch.stacks[-1]))
            for number, batch in enumerate(stream.batches)
        ]
        self._after = losses.means(values)

    def _step(self, step: int) -> list[float | None]:
        """Take a step; return the mean loss of each model's tokens before it."""
        stream, losses = self._forward(step)
        parts = losses.by_model() if self._learning.by_model else [range(len(stream.batches))]
        values = self._passes.backward(stream, losses.of, parts)
        gradients = self._coefficients.take_gradients()
        if self._learning.by_model:
            self._update(step, gradients)
            return losses.means(values)
        for group, own in self._coefficients.values.items():
            own.grad = gradients[group][0]
        if self._learning.penalty is not None:
            self._add_penalty()
        self._optimiser.step()
        return losses.means(values)

    def _update(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        """Take the method's own step, given the gradient of each model's loss."""
        assert self._learning.update is not None
        for group, own in self._coefficients.values.items():
            given = {
                **self._settings,
                "values": own.flatten(1),
                "gradients": gradients[group].flatten(2),
                "number": step,
            }
            found = self._learning.update(**{name: given[name] for name in takes(self._learning.update)})
            own.copy_(found.view(own.shape))

    def _forward(self, step: int) -> tuple[Stream, Losses]:
        """Run the blocks on the sequences of a step."""
        owners = [
            (model, number)
            for model, own in enumerate(self._data)
            if own
            for number in of_step(step, self._batch, len(own))
        ]
        batches = lined_up([self._data[model][number] for model, number in owners])
        self._passes.fill_outside()
        stream = self._passes.forward(batches)
        return stream, Losses(self._learning, self._settings, self._weight, self._teachers, owners, batches)

    def _add_penalty(self) -> None:
        """Add the gradient of the penalty to that of the coefficients."""
        assert self._learning.penalty is not None
        values = self._coefficients.values
        with torch.enable_grad():
            leaves = [own.detach().clone().requires_grad_() for own in values.values()]
            given = {**self._settings, "coefficients": [own.flatten(1) for own in leaves]}
            penalty = self._learning.penalty(**{name: given[name] for name in takes(self._learning.penalty)})
            if penalty.requires_grad:
                found = torch.autograd.grad(penalty, leaves, allow_unused=True)
                for own, gradient in zip(values.values(), found, strict=True):
                    if gradient is not None and own.grad is not None:
                        own.grad += gradient

    def _note(self) -> None:
        """Store what a continued run needs.

        Raises:
            OutputError: The disk is full or failed.
        """
        if self._done:
            file = self._target.folder / _STATES[self._done % 2]
            state = {
                "values": self._coefficients.values,
                "optimiser": self._optimiser.state_dict(),
                "losses": self._losses,
            }
            save_working(state, file)
        teachers = None if self._teachers is None else self._teachers.states
        self._target.note({"done": self._done, "teachers": teachers})

    def _restore(self, file: Path) -> None:
        found = load_working(file)
        for group, own in self._coefficients.values.items():
            own.copy_(found["values"][group])
        self._optimiser.load_state_dict(found["optimiser"])
        self._losses = found["losses"]

    def write(self, about: Sequence[Mapping[str, Any]]) -> None:
        """Write the coefficients of every model.

        Args:
            about: What statistics.json says of each model.
        """
        blocks = self._skeleton.blocks
        files = [file_name(number, len(blocks) + 1) for number in range(1, len(blocks) + 2)]
        place = {source: file for file, block in zip(files, blocks, strict=False) for source in block.sources}
        for k, (name, own) in enumerate(zip(self._names, about, strict=True)):
            folder = self._target.folder / name
            folder.mkdir(exist_ok=True)
            count = sum(int(batch.stacks[-1].counted.sum()) for batch in self._data[k])
            found = [coefficient_sums(t.name, t.shape, self._coefficients.of(t.name)[k], count) for t in self._tensors]
            for file in files:
                here = [tapped for tapped in found if place.get(tapped.names[0], files[-1]) == file]
                write_sums(
                    folder / file,
                    {sum_name(kind, each.names[0]): value for each in here for kind, value in each.sums.items()},
                )
            tensors = described(found)
            learning = {
                "steps": self._steps,
                "losses": [losses[k] for losses in self._losses],
                "before": self._losses[0][k],
                "after": self._after[k],
            }
            missing = without(self._skeleton, tensors)
            write_about(folder, {**own, "without": missing, "files": files, "tensors": tensors, "learning": learning})
