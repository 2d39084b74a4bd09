"""Make gates from files of text, and test them on text that they were not made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..making import cut_texts, texts_of_tasks
from ..rows import choices, nats, token_rows
from .belonging import open_belonging
from .fitting import Training
from .model import GatedModel
from .settings import GateSettings

__all__ = ["GateReport", "make_gates"]


@dataclass(frozen=True)
class GateReport:
    """Gates that were made and saved.

    Args:
        file: The file.
        fitted: Number of windows that the gates were made from, by task.
        right: Of each task, the share of its held-out windows in which it has the largest weight, on average over gates.
        shares: For each task, the mean weight of every task on its held-out windows.
        loss: For each task, nats per token of its held-out windows: "shared" without parts, "told" with the parts of the
            task in full, "gates" with the weights that the gates give.
        length: Tokens of a window.
        layers: Number of linear layers with parts, or of modules with experts.
        part_bytes: Bytes of the parts or experts.
        unused: Number of other tensors in which tasks may differ, which stay those of the shared model.
        trained: What became less in training, before each step.
    """

    file: Path
    fitted: Mapping[str, int]
    right: Mapping[str, float]
    shares: Mapping[str, Mapping[str, float]]
    loss: Mapping[str, Mapping[str, float]]
    length: int
    layers: int
    part_bytes: int
    unused: int
    trained: Sequence[float]


def make_gates(
    out: str | Path,
    data: Mapping[str, Sequence[str | Path]],
    gates: str | GateSettings,
    *,
    length: int | None = None,
    windows: int = 200,
    ridge: float = 0.1,
    training: Training | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> GateReport:
    """Make gates from texts of each task, try them on held-out text, and save them beside the tasks.

    Args:
        out: As for `GatedModel`.
        data: Files by the name of their task; every task has some.
        gates: Kind or settings of the gates.
        length: Tokens of a window; by default 256, or what the model can see if that is less.
        windows: Most windows of a task, spread evenly over its text. Every fifth is held out.
        ridge: Regularisation, relative to the mean square of what the gates read.
        training: How the gates are trained after the regression.
        device: Where the model runs.
        progress: Called with the number of texts or steps done, and of all.

    Raises:
        MergeError: As for `GatedModel`, `texts_of_tasks` and `cut_texts`.
    """
    to = open_belonging(out)
    given = texts_of_tasks(out, to.names, data)
    model = GatedModel(to, gates, device=device)
    texts = cut_texts(given, model.tokenizer, model.positions, length, windows)
    trained = model.fit(texts.fitted, ridge=ridge, training=training, length=texts.length, advance=progress)
    right, shares, loss = {}, {}, {}
    for number, (task, own) in enumerate(texts.held.items()):
        rows = token_rows(model.tokenizer, own, texts.length, model.device)
        right[task], means = choices(model.shares, rows, number)
        shares[task] = dict(zip(model.tasks, means, strict=True))
        loss[task] = {"gates": nats(model.logits, rows)}
        for name, told in (("shared", None), ("told", number)):
            model.layers.tell(told)
            loss[task][name] = nats(model.logits, rows)
            model.layers.ask()
    return GateReport(
        file=model.save(),
        fitted={task: len(own) for task, own in texts.fitted.items()},
        right=right,
        shares=shares,
        loss=loss,
        length=texts.length,
        layers=model.layers.count,
        part_bytes=model.part_bytes,
        unused=model.unused,
        trained=trained,
    )
