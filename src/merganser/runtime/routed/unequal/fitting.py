"""Make the router of a mixture from text in closed form, and train router and projections."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ....errors import NonFiniteError, ParameterError
from ....mixture.fitted import ridge_rows
from ..gated.fitting import Training

if TYPE_CHECKING:
    from .mixture import Mixture

__all__ = ["ridge_router", "train_mixture"]

Advance = Callable[[int, int], None]

_SHARP = 10.0
"""Factor of the predictions of a ridge regression, which lie between 0 and 1, before a softmax."""


@torch.no_grad()
def ridge_router(
    mixture: Mixture, texts: Sequence[Sequence[Tensor]], ridge: float, advance: Advance | None = None
) -> tuple[Tensor, Tensor]:
    """Fit a router by ridge regression from the mean embedding after every token to the task of the text.

    Tasks count alike, and so do all lengths of a text.

    Args:
        mixture: The experts.
        texts: For each task, its texts as tokens, shape [1, length].
        ridge: Regularisation, relative to the mean square of what is read.
        advance: Called with the number of texts done, and of all.

    Returns:
        Weights, shape [experts, width], and biases, shape [experts], float32.

    Raises:
        ParameterError: `ridge` is not a positive number.
        NonFiniteError: The regression gives NaN or infinity.
    """
    if not 0 < ridge < float("inf"):
        raise ParameterError(f"ridge must be a positive number, found {ridge}")
    gram: Tensor | None = None
    means = []
    done, total = 0, sum(map(len, texts))
    for windows in texts:
        own: Tensor | None = None
        sums: Tensor | None = None
        count = 0
        for ids in windows:
            x = mixture.read(ids, torch.ones_like(ids))[0].cpu()
            square, added = (x.T @ x).double(), x.sum(0).double()
            own = square if own is None else own.add_(square)
            sums = added if sums is None else sums.add_(added)
            count += len(x)
            done += 1
            if advance is not None:
                advance(done, total)
        assert own is not None
        assert sums is not None
        gram = own / count if gram is None else gram.add_(own / count)
        means.append(sums / count)
    assert gram is not None
    rows = ridge_rows(gram, torch.stack(means), ridge)
    if not rows.isfinite().all():
        raise NonFiniteError("the ridge regression of the router gives NaN or infinity")
    return rows.to(mixture.device) * _SHARP, torch.zeros(len(rows), device=mixture.device)


def train_mixture(
    mixture: Mixture, texts: Sequence[Sequence[Tensor]], training: Training, advance: Advance | None = None
) -> list[float]:
    """Train the router and the projections of a mixture, on the texts of all tasks; nothing else changes.

    While it is trained, all experts are mixed, whatever `top` says: the choice of the best has no gradient.

    Args:
        mixture: The mixture.
        texts: For each task, its texts as tokens, shape [1, length].
        training: How.
        advance: Called with the number of steps done, and of all.

    Returns:
        The loss, before each step.

    Raises:
        ParameterError: There is nothing to train, or it is asked for what cannot be done here.
        NonFiniteError: The loss became NaN or infinity.
    """
    if training.objective != "loss" or training.balance:
        raise ParameterError("a mixture of unequal experts is trained on the loss of the next token alone")
    # the weight of a single expert is 1
    routed = mixture.settings.by == "router" and len(mixture.names) > 1
    parameters = list(mixture.router or ()) if routed else []
    if mixture.tables is not None:
        parameters += [*mixture.tables.into, *mixture.tables.out]
    if not parameters:
        raise ParameterError(
            "steps: own embeddings, with weights by perplexity or a single expert, have nothing that could be trained"
        )
    for each in parameters:
        each.requires_grad_(True)
    adam = torch.optim.Adam(parameters, lr=training.rate)
    draw = random.Random(training.seed)
    losses = []
    task = 0
    try:
        for step in range(training.steps):
            adam.zero_grad()
            total = 0.0
            for _ in range(training.batch):
                ids = draw.choice(texts[task % len(texts)])
                task += 1
                loss = _loss(mixture, ids, routed) / training.batch
                torch.autograd.backward(loss)
                total += float(loss.detach())
            if not torch.isfinite(torch.tensor(total)):
                raise NonFiniteError(f"step {step + 1}: the loss of the mixture is {total}; a smaller rate may help")
            losses.append(total)
            adam.step()
            if advance is not None:
                advance(step + 1, training.steps)
    finally:
        for each in parameters:
            each.requires_grad_(False)
    return losses


def _loss(mixture: Mixture, ids: Tensor, routed: bool) -> Tensor:
    if routed:
        weights = mixture.scores(mixture.read(ids, torch.ones_like(ids))).softmax(-1)
    else:
        with torch.no_grad():
            weights = mixture.weights_so_far(ids, None)
    logits = mixture(ids, weights=weights).logits[:, :-1].float()
    return cross_entropy(logits.mT, ids[:, 1:])
