"""Make a mixture from files of text, and test it on text that it was not made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..gated.fitting import Training
from ..making import cut_texts, texts_of_tasks
from ..rows import choices, nats, token_rows
from .experts import open_experts
from .model import UnequalModel
from .settings import MixtureSettings

__all__ = ["MixtureReport", "make_mixture"]


@dataclass(frozen=True)
class MixtureReport:
    """A mixture that was made and saved.

    Args:
        file: The file.
        settings: How the experts are mixed.
        parameters: Number of weights of each expert.
        fitted: Number of windows that the mixture was made from, by task; 0 where nothing is made from text.
        right: Of each task, the share of its held-out windows in which its expert has the largest weight.
        shares: For each task, the mean weight of every expert on its held-out windows.
        loss: For each task, nats per token of its held-out windows: of the "mixture", of its own expert between the shared
            embedding and head ("projected", if they are shared), and of each expert alone, as "alone NAME".
        length: Tokens of a window.
        trained: The loss of training, before each step.
    """

    file: Path
    settings: MixtureSettings
    parameters: Mapping[str, int]
    fitted: Mapping[str, int]
    right: Mapping[str, float]
    shares: Mapping[str, Mapping[str, float]]
    loss: Mapping[str, Mapping[str, float]]
    length: int
    trained: Sequence[float]


def make_mixture(
    out: str | Path,
    data: Mapping[str, Sequence[str | Path]],
    settings: MixtureSettings,
    *,
    length: int | None = None,
    windows: int = 200,
    ridge: float = 0.1,
    training: Training | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> MixtureReport:
    """Make a mixture from texts for each expert, try it on held-out text, and save it beside the experts.

    Args:
        out: A folder that has a folder for each model.
        data: Files by the name of the expert that they are for; every one has some.
        settings: How the experts are mixed.
        length: Tokens of a window; by default 256, or what all experts can see if that is less.
        windows: Most windows of a task, spread evenly over its text. Every fifth is held out.
        ridge: Regularisation of the router, relative to the mean square of what it reads.
        training: How router and projections are trained.
        device: Where the models run.
        progress: Called with the number of texts or steps done, and of all.

    Raises:
        MergeError: As for `UnequalModel`, `texts_of_tasks` and `cut_texts`.
    """
    to = open_experts(out)
    given = texts_of_tasks(out, to.names, data)
    model = UnequalModel(to, settings, device=device)
    texts = cut_texts(given, model.tokenizer, model.positions, length, windows)
    made = settings.by == "router" or (training is not None and training.steps > 0)
    trained = (
        model.fit(texts.fitted, ridge=ridge, training=training, length=texts.length, advance=progress) if made else []
    )
    right, shares, loss = {}, {}, {}
    for number, (task, own) in enumerate(texts.held.items()):
        rows = token_rows(model.tokenizer, own, texts.length, model.device)
        right[task], means = choices(model.weights, rows, number)
        shares[task] = dict(zip(model.tasks, means, strict=True))
        loss[task] = _losses(model, task, rows)
    return MixtureReport(
        file=model.save(),
        settings=settings,
        parameters={
            task: int(expert.num_parameters()) for task, expert in zip(model.tasks, model.model.experts, strict=True)
        },
        fitted={task: len(own) if made else 0 for task, own in texts.fitted.items()},
        right=right,
        shares=shares,
        loss=loss,
        length=texts.length,
        trained=trained,
    )


@torch.no_grad()
def _losses(model: UnequalModel, task: str, rows: Sequence[Tensor]) -> dict[str, float]:
    found = {"mixture": nats(model.logits, rows)}
    if model.settings.shared:
        model.task = task
        found["projected"] = nats(model.logits, rows)
        model.task = None
    for number, name in enumerate(model.tasks):
        found[f"alone {name}"] = nats(partial(model.model.alone, number), rows)
    return found
