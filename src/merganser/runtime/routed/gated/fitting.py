"""Make gates from text: in closed form by ridge regression, and by training the gates alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ....errors import NonFiniteError, ParameterError, UnsupportedError
from ....mixture.fitted import ridge_rows
from .routing import Gates, Routing

__all__ = ["Training", "ridge_gates", "train_gates"]

_MEMORY = 1 << 30
"""Bytes of Gram matrices that are summed up at a time; with more, the text passes through the model again."""

_SHARP = 10.0
"""Factor of the predictions of a ridge regression, which lie between 0 and 1, before a softmax."""

Advance = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Training:
    """How gates are trained; everything else stays as it is.

    Args:
        steps: Steps of Adam.
        rate: Its learning rate.
        objective: What is minimised: the "loss" of the next token, or the "entropy" of its distribution, which needs no
            labels, but rewards confident predictions.
        balance: Weight of the balance loss of MoLE, the negative sum of the logarithms of the tasks' mean weights.
        batch: Windows of a step.
        seed: Of the order of the windows.

    Raises:
        ParameterError: A value is not valid.
    """

    steps: int
    rate: float = 1e-3
    objective: str = "loss"
    balance: float = 0.0
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in ("loss", "entropy"):
            raise ParameterError(f"objective: must be 'loss' or 'entropy', found {self.objective!r}")
        for name, least in (("steps", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise ParameterError(f"{name}: must be a whole number of at least {least}, found {getattr(self, name)}")
        if not 0 < self.rate < float("inf"):
            raise ParameterError(f"rate: must be a positive number, found {self.rate}")
        if not 0 <= self.balance < float("inf"):
            raise ParameterError(f"balance: must be a number of at least 0, found {self.balance}")


@torch.no_grad()
def ridge_gates(
    model: Any, layers: Routing, texts: Sequence[Sequence[Tensor]], ridge: float, advance: Advance | None = None
) -> Gates:
    """Fit each gate by ridge regression from what it reads to the task of the text; tasks count alike.

    The text of a task passes through the model with that task's parts in full, or its modules, which is what the gate reads
    where those before it are right.

    Args:
        model: The model in which the layers are.
        layers: The layers.
        texts: For each task, its texts as tokens, shape [1, length].
        ridge: Regularisation, relative to the mean square of what is read.
        advance: Called with the number of texts done, and of all.

    Raises:
        ParameterError: `ridge` is not a positive number.
        UnsupportedError: The gates read outputs, and have no closed form here.
        NonFiniteError: The regression gives NaN or infinity.
    """
    if not 0 < ridge < float("inf"):
        raise ParameterError(f"ridge must be a positive number, found {ridge}")
    if layers.settings.reads == "outputs":
        raise UnsupportedError("gates that read outputs (mole) are trained, and have no closed form here: give steps")
    found = layers.zeros()
    keys = list(layers.keys())
    if not keys:
        return found
    width = max(layers.widths.values())
    at_once = max(1, _MEMORY // (8 * width * width))
    rounds = [keys[start : start + at_once] for start in range(0, len(keys), at_once)]
    done, total = 0, len(rounds) * sum(map(len, texts))
    for own in rounds:
        sums = _Sums(layers, own)
        for task, windows in enumerate(texts):
            layers.tell(task)
            layers.look = sums.look
            for ids in windows:
                model.base_model(input_ids=ids, use_cache=False)
                done += 1
                if advance is not None:
                    advance(done, total)
            layers.look = None
            sums.close()
        for key in own:
            rows = ridge_rows(sums.gram[key], torch.stack(sums.means[key]), ridge)
            if not rows.isfinite().all():
                raise NonFiniteError(f"{key}: the ridge regression of the gate gives NaN or infinity")
            found.weights[key] = rows * (_SHARP if layers.settings.weights != "scores" else 1.0)
    layers.ask()
    return found


class _Sums:
    """Sums over what some gates read of each task's text."""

    def __init__(self, layers: Routing, keys: Sequence[str]) -> None:
        self._layers, self._keys = layers, set(keys)
        self.gram: dict[str, Tensor] = {}
        self.means: dict[str, list[Tensor]] = {key: [] for key in keys}
        self._own: dict[str, tuple[Tensor, Tensor, int]] = {}

    def look(self, site: str, read: Tensor) -> None:
        """Add what a gate reads."""
        key = self._layers.key(site)
        if key not in self._keys:
            return
        x = read.float().cpu()
        gram, total, count = (x.T @ x).double(), x.sum(0).double(), len(x)
        if key in self._own:
            before = self._own[key]
            gram, total, count = gram.add_(before[0]), total + before[1], count + before[2]
        self._own[key] = gram, total, count

    def close(self) -> None:
        """End the text of a task."""
        for key, (gram, total, count) in self._own.items():
            mean = gram / count
            self.gram[key] = mean if key not in self.gram else self.gram[key].add_(mean)
            self.means[key].append(total / count)
        self._own = {}


def train_gates(
    model: Any,
    layers: Routing,
    texts: Sequence[Sequence[Tensor]],
    training: Training,
    advance: Advance | None = None,
) -> list[float]:
    """Train the gates that the layers have, on the texts of all tasks; nothing else changes.

    Args:
        model: The model in which the layers are.
        layers: The layers, with gates.
        texts: For each task, its texts as tokens, shape [1, length].
        training: How.
        advance: Called with the number of steps done, and of all.

    Returns:
        What was to become less, before each step.

    Raises:
        NonFiniteError: It became NaN or infinity.
    """
    assert layers.gates is not None
    parameters = layers.gates.parameters()
    for weight in model.parameters():
        weight.requires_grad_(False)
    for gate in parameters:
        gate.requires_grad_(True)
    adam = torch.optim.Adam(parameters, lr=training.rate)
    drawn = _drawn(texts, training)
    losses = []
    layers.noted = {} if training.balance else None
    try:
        for step in range(training.steps):
            adam.zero_grad()
            total = 0.0
            for _ in range(training.batch):
                loss = _loss(model, layers, next(drawn), training) / training.batch
                torch.autograd.backward(loss)
                total += float(loss.detach())
            if not torch.isfinite(torch.tensor(total)):
                raise NonFiniteError(
                    f"step {step + 1}: the {training.objective} of the gates is {total}; a smaller rate may help"
                )
            losses.append(total)
            adam.step()
            if advance is not None:
                advance(step + 1, training.steps)
    finally:
        layers.noted = None
        for gate in parameters:
            gate.requires_grad_(False)
    return losses


def _loss(model: Any, layers: Routing, ids: Tensor, training: Training) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if training.objective == "loss":
        found: Tensor = cross_entropy(logits.mT, ids[:, 1:])
    else:
        likely = logits.log_softmax(-1)
        found = -(likely.exp() * likely).sum(-1).mean()
    if layers.noted:
        means = torch.stack([own.mean(0) for own in layers.noted.values()])
        found = found - training.balance * means.clamp_min(1e-6).log().sum(-1).mean()
    return found


def _drawn(texts: Sequence[Sequence[Tensor]], training: Training) -> Any:
    """Yield windows, one task after the other, the windows of each in an order that is drawn anew after the last."""
    draw = random.Random(training.seed)
    left: list[list[Tensor]] = [[] for _ in texts]
    while True:
        for task, windows in enumerate(texts):
            if not left[task]:
                left[task] = list(windows)
                draw.shuffle(left[task])
            yield left[task].pop()
