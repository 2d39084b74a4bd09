"""Bits per byte and next-token accuracy of texts.

A text is tokenised as a whole. The first window scores the first `context` tokens; each further window scores the next
`stride` tokens, after as many preceding tokens as the window has room for, so that every token is scored once. If the
tokenizer adds a token (BOS) at the start of texts, every window starts with it, and it counts towards `context`.
Without BOS, the first token of a text cannot be predicted: it is not scored, and its bytes are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ...errors import TaskError
from ...inference.language_model import Tokenizer
from .batches import Refused, batches, in_order, logits_at, right_padded
from .estimate import Estimate
from .outcome import Outcome
from .tasks import TextTask

COLUMNS = ("bits", "correct", "tokens", "bytes")


@dataclass(frozen=True, slots=True)
class Window:
    """A window of a text.

    Args:
        item: Index of the item that it belongs to.
        fed: Input tokens.
        targets: Tokens to predict: those that follow each of the last `len(targets)` tokens of `fed`.
        nbytes: Number of UTF-8 bytes of the targets.
    """

    item: int
    fed: tuple[int, ...]
    targets: tuple[int, ...]
    nbytes: int


def cut(count: int, prefix: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a text into windows.

    Args:
        count: Number of its tokens.
        prefix: Number of tokens that every window starts with (BOS).
        context: Largest number of input tokens of a window, including the prefix.
        stride: Tokens that each window but the first scores.

    Yields:
        Index of the first input token, index of the first scored token, and index after the last scored token, which
        is not an input.
    """
    room = context - prefix
    first, end = (0 if prefix else 1), min(count, room + 1)
    while first < end:
        yield max(0, end - 1 - room), first, end
        first, end = end, min(count, end + stride)


def windows(
    task: TextTask, tokenizer: Tokenizer, *, context: int, stride: int, limit: int | None = None
) -> tuple[list[Window], list[Any]]:
    """Cut the texts of a task into windows.

    Args:
        task: The texts.
        tokenizer: Tokenizer of the model.
        context: Largest number of input tokens of a window, at least 2 more than the tokenizer's prefix.
        stride: Tokens that each window but the first of a text scores; at most `context`.
        limit: Number of items: documents, or windows if there is only one document; None for all.

    Returns:
        The windows, and an identifier of each item: the number of its document, or the byte at which its window begins.
        Two models with equal identifiers were scored on the same items.
    """
    made: list[Window] = []
    items: list[Any] = []
    whole = task.unit == "document"
    prefix = len(tokenizer.prefix)
    stride = min(stride, context - max(prefix - 1, 0))
    for number, document in enumerate(task.documents[:limit] if whole else task.documents):
        ids, bounds = _tokens(document, tokenizer)
        if whole:
            items.append(number)
        for begin, first, end in cut(len(ids), prefix, context, stride):
            if not whole:
                if len(items) == limit:
                    break
                items.append(int(bounds[first]))
            fed = (*tokenizer.prefix, *ids[begin : end - 1])
            made.append(Window(len(items) - 1, fed, tuple(ids[first:end]), int(bounds[end] - bounds[first])))
    return made, items


def _tokens(text: str, tokenizer: Tokenizer) -> tuple[list[int], NDArray[np.int64]]:
    """Return the tokens of a text, and the byte offset at which each begins, followed by the text's length."""
    ids, ends = tokenizer.ids_and_ends(text)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    # all tokens of one character have the end of the character as their end: the first of them gets its bytes
    behind = np.maximum.accumulate(np.array([0, *ends], np.int64))
    if ids:
        behind[-1] = len(codes)
    return ids, bytes_before[behind]


def score(model: Any, found: Sequence[Window]) -> dict[str, list[float]]:
    """Score a batch of windows.

    Args:
        model: A causal language model of transformers.
        found: The windows.

    Returns:
        `COLUMNS`, each with a number per window: bits of the targets, number of targets that were the most likely
        token, number of targets, number of bytes.

    Raises:
        Refused: The logits are not finite.
    """
    ids = right_padded([w.fed for w in found], model.device)
    spans = [(len(w.fed) - len(w.targets), len(w.fed)) for w in found]
    kept = torch.tensor(sorted({place for span in spans for place in range(*span)}), device=model.device)
    logits = logits_at(model, kept, input_ids=ids)
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for row, (window, (begin, end)) in enumerate(zip(found, spans, strict=True)):
        targets = torch.tensor(window.targets, device=model.device)
        scored = logits[row, torch.searchsorted(kept, torch.arange(begin, end, device=model.device))].float()
        nats = torch.nn.functional.cross_entropy(scored, targets, reduction="sum").item()
        if not math.isfinite(nats):
            raise Refused(f"NaN or infinity in the logits, at item {window.item + 1} of the text")
        columns["bits"].append(nats / math.log(2))
        columns["correct"].append(int((scored.argmax(-1) == targets).sum()))
        columns["tokens"].append(len(window.targets))
        columns["bytes"].append(window.nbytes)
    return columns


@dataclass(frozen=True)
class PreparedText:
    """A text task, tokenised for a model.

    Args:
        task: The task.
        windows: Its windows.
        items: Identifier of each item.
        batches: Indices of windows, batch by batch.
        vocabulary: Number of logits per token.
        budget: Largest number of input tokens of a batch.
    """

    task: TextTask
    windows: Sequence[Window]
    items: Sequence[Any]
    batches: Sequence[Sequence[int]]
    vocabulary: int
    budget: int

    def prompt(self, row: int) -> Sequence[int]:
        """Return the input tokens of a window, those that it scores among them."""
        return self.windows[row].fed

    def measure(self, model: Any, rows: Sequence[int]) -> dict[str, Any]:
        """Score the windows of a batch."""
        return score(model, [self.windows[row] for row in rows])

    def measure_items(self, model: Any, items: Sequence[int]) -> dict[str, list[float]]:
        """Score some items on a loaded model; the windows of the same items always share the same batches.

        Args:
            model: The model.
            items: Their indices.

        Returns:
            `COLUMNS`, each with the sum over the windows of each of these items.
        """
        rows = [row for row, window in enumerate(self.windows) if window.item in set(items)]
        windows = [self.windows[row] for row in rows]
        grouped = batches(
            [len(w.fed) for w in windows], [len(w.targets) for w in windows], self.vocabulary, self.budget
        )
        sums = {name: dict.fromkeys(items, 0.0) for name in COLUMNS}
        for batch in grouped:
            content = score(model, [windows[i] for i in batch])
            for name in COLUMNS:
                for i, value in zip(batch, content[name], strict=True):
                    sums[name][windows[i].item] += value
        return {name: [own[item] for item in items] for name, own in sums.items()}

    def outcome(self, contents: Sequence[Mapping[str, Any]]) -> Outcome:
        """Return the metrics: measurements are summed over the windows of each item, then over items."""
        rows = in_order(self.batches, contents)
        owners, count = [window.item for window in self.windows], len(self.items)
        columns = {name: np.bincount(owners, weights=rows[name], minlength=count) for name in COLUMNS}
        metrics = text_metrics(columns, (self.task.name, hash(tuple(self.items))))
        totals = {name: int(columns[name].sum()) for name in ("bytes", "tokens")}
        return Outcome(metrics, columns, count, totals, HIGHER)


HIGHER = {"bits_per_byte": False, "token_accuracy": True}
"""Whether higher is better, by metric; the main metric first."""


def text_metrics(columns: Mapping[str, ArrayLike], items: Hashable) -> dict[str, Estimate]:
    """Return the metrics from the measurements of items.

    Args:
        columns: `COLUMNS`, one entry per item.
        items: Key of this set of items.
    """
    return {
        "bits_per_byte": Estimate.of_ratio(columns["bits"], columns["bytes"], items),
        "token_accuracy": Estimate.of_ratio(columns["correct"], columns["tokens"], items),
    }


def prepare_text(
    task: TextTask, tokenizer: Tokenizer, *, context: int, stride: int, limit: int | None, vocabulary: int, budget: int
) -> PreparedText:
    """Cut a text task into windows, and divide these into batches.

    Args:
        task: The texts.
        tokenizer: Tokenizer of the model.
        context: As for `windows`.
        stride: As for `windows`.
        limit: As for `windows`.
        vocabulary: Number of logits per token.
        budget: Largest number of input tokens of a batch.

    Raises:
        TaskError: The texts have no token that can be predicted.
    """
    found, items = windows(task, tokenizer, context=context, stride=stride, limit=limit)
    if not found:
        raise TaskError(f"{task.source}: is too short: it has no token to predict from earlier ones")
    rows = batches([len(w.fed) for w in found], [len(w.targets) for w in found], vocabulary, budget)
    return PreparedText(task, found, items, rows, vocabulary, budget)
