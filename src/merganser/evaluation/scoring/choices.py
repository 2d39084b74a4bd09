"""Multiple choice by log-likelihood: which continuation of a context is the most likely under the model.

The context is run once; its keys and values are cached and reused for every choice. Models with a recurrent state
instead of keys and values (Mamba and the like) are run on the context and each choice together.

Tokens are the same as in lm-eval: white space at the end of the context is moved to the choice; context and choice are
tokenised together, and the tokens after those of the context alone belong to the choice. If the joint tokens do not
begin with those of the context (the tokenizer has joined letters of both), the choice is tokenised by itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...errors import TaskError
from ...inference.language_model import Tokenizer
from .batches import Refused, batches, in_order, logits_at, right_padded, takes
from .estimate import Estimate
from .outcome import Outcome
from .tasks import ChoiceTask, Question

COLUMNS = ("gold", "loglikelihood", "bytes")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tokenised question.

    Args:
        context: Tokens before each choice, truncated at the left if there are too many.
        choices: Tokens of each choice.
        nbytes: Number of UTF-8 bytes of each choice, without leading white space.
        gold: Index of the right choice.
        where: File and line, for messages.
    """

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    nbytes: tuple[int, ...]
    gold: int
    where: str

    @property
    def longest(self) -> int:
        """Number of tokens of the longest choice."""
        return max(map(len, self.choices))


def encode(task: ChoiceTask, tokenizer: Tokenizer, positions: int | None, limit: int | None = None) -> list[Encoded]:
    """Tokenise questions.

    Args:
        task: The questions.
        tokenizer: Tokenizer of the model.
        positions: Size of the model's context window in tokens; a longer context loses its first tokens.
        limit: Number of questions; None for all.

    Raises:
        TaskError: A choice alone exceeds the context window, or a context is empty and the tokenizer has no BOS or EOS.
    """
    return [_encode(question, tokenizer, positions) for question in task.questions[:limit]]


def _encode(question: Question, tokenizer: Tokenizer, positions: int | None) -> Encoded:
    stem = question.context.rstrip()
    space = question.context[len(stem) :]
    before = tokenizer.ids(stem) if stem else []
    choices = tuple(_choice_ids(tokenizer, stem, space + choice, before) for choice in question.choices)
    prefix = tokenizer.prefix
    if not before and not prefix:
        if tokenizer.start is None:
            raise TaskError(f"{question.where}: the context is empty, and the tokenizer has no token for it")
        prefix = (tokenizer.start,)
    if positions is not None:
        # the last token of a choice is predicted, but not an input
        room = positions - len(prefix) - (max(map(len, choices)) - 1)
        if room < (0 if prefix else 1):
            raise TaskError(
                f"{question.where}: the longest choice has {max(map(len, choices)):,} tokens, more than the model can "
                f"see at once ({positions:,} with at least one before it); shorten it"
            )
        before = before[len(before) - room :] if room < len(before) else before
    nbytes = tuple(len(choice.lstrip().encode()) for choice in question.choices)
    return Encoded((*prefix, *before), choices, nbytes, question.gold, question.where)


def _choice_ids(tokenizer: Tokenizer, stem: str, choice: str, before: list[int]) -> tuple[int, ...]:
    whole = tokenizer.ids(stem + choice)
    joined = whole[: len(before)] != before or len(whole) == len(before)
    return tuple(tokenizer.ids(choice) if joined else whole[len(before) :])


def score(model: Any, questions: Sequence[Encoded]) -> dict[str, list[Any]]:
    """Score a batch of questions.

    Args:
        model: A causal language model of transformers.
        questions: The questions.

    Returns:
        `COLUMNS`, each with one entry per question: index of the right choice, natural log-likelihood of each choice,
        bytes of each choice.

    Raises:
        Refused: A log-likelihood is not finite.
    """
    scores = _with_cache(model, questions) if keeps_keys(model) else _without_cache(model, questions)
    for question, values in zip(questions, scores, strict=True):
        if not all(map(math.isfinite, values)):
            raise Refused(f"NaN or infinity in the logits, at {question.where}")
    return {
        "gold": [q.gold for q in questions],
        "loglikelihood": scores,
        "bytes": [list(q.nbytes) for q in questions],
    }


def keeps_keys(model: Any) -> bool:
    """Return whether a model caches its context as keys and values, which can be repeated for every choice."""
    return not getattr(model, "_is_stateful", False) and _cache_name(model) is not None


def _cache_name(model: Any) -> str | None:
    # transformers 5.24 calls it `cache`
    return next((name for name in ("cache", "past_key_values") if takes(model, name)), None)


def _with_cache(model: Any, questions: Sequence[Encoded]) -> list[list[float]]:
    """Run the contexts once, then every choice with the cache of its context."""
    device = model.device
    width = max(len(q.context) for q in questions)
    # padded at the left, so that all contexts end, and all choices begin, at the same position
    ids = torch.tensor([[0] * (width - len(q.context)) + list(q.context) for q in questions], device=device)
    mask = torch.tensor([[0] * (width - len(q.context)) + [1] * len(q.context) for q in questions], device=device)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if takes(model, "position_ids"):
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if takes(model, "logits_to_keep"):
        given["logits_to_keep"] = 1
    with torch.inference_mode():
        ran = model(**given, use_cache=True)
        first = ran.logits[:, -1].float().log_softmax(-1)
        owners = torch.tensor([i for i, q in enumerate(questions) for _ in q.choices], device=device)
        rows = [choice for q in questions for choice in q.choices]
        nats = first[owners, torch.tensor([row[0] for row in rows], device=device)].double()
        if any(len(row) > 1 for row in rows):
            nats += _behind(model, ran[_cache_name(model)], mask, owners, rows)
    return _grouped(nats, questions)


def _behind(model: Any, cache: Any, mask: Tensor, owners: Tensor, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the log-likelihoods of the choices without their first tokens, float64, shape [rows]."""
    cache.batch_select_indices(owners)
    ids = right_padded([row[:-1] for row in rows], model.device)
    before = mask[owners]
    given: dict[str, Any] = {"attention_mask": torch.cat([before, torch.ones_like(ids)], dim=1)}
    if takes(model, "position_ids"):
        given["position_ids"] = before.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device)
    given[str(_cache_name(model))] = cache
    logits = model(input_ids=ids, use_cache=True, **given).logits
    return _sums(logits, [row[1:] for row in rows])


def _without_cache(model: Any, questions: Sequence[Encoded]) -> list[list[float]]:
    """Run context and choice together, for every choice."""
    rows = [(q.context, choice) for q in questions for choice in q.choices]
    ids = right_padded([(*context, *choice[:-1]) for context, choice in rows], model.device)
    begin = min(len(q.context) for q in questions) - 1
    logits = logits_at(model, torch.arange(begin, ids.shape[1], device=ids.device), input_ids=ids)
    starts = [len(context) - 1 - begin for context, _ in rows]
    return _grouped(_sums(logits, [choice for _, choice in rows], starts), questions)


def _sums(logits: Tensor, targets: Sequence[tuple[int, ...]], starts: Sequence[int] | None = None) -> Tensor:
    """Return the summed log-likelihood of each row's targets, from position `starts[row]` on, float64, shape [rows]."""
    sums = []
    for row, wanted in enumerate(targets):
        start = starts[row] if starts else 0
        log_probabilities = logits[row, start : start + len(wanted)].float().log_softmax(-1)
        picked = log_probabilities.gather(
            1, torch.tensor(wanted, dtype=torch.int64, device=log_probabilities.device)[:, None]
        )
        sums.append(picked.double().sum())
    return torch.stack(sums)


def _grouped(nats: Tensor, questions: Sequence[Encoded]) -> list[list[float]]:
    parts = torch.split(nats, [len(q.choices) for q in questions])
    return [part.tolist() for part in parts]


def right(rows: Mapping[str, Sequence[Any]]) -> dict[str, NDArray[np.float64]]:
    """Return for each question whether the most likely choice is right (1.0 or 0.0), shape [questions].

    `correct` compares log-likelihoods, `correct_norm` log-likelihoods per byte. Of equal choices the first counts.
    """
    plain, normal = [], []
    for gold, nats, nbytes in zip(*(rows[name] for name in COLUMNS), strict=True):
        plain.append(float(np.argmax(nats) == gold))
        normal.append(float(np.argmax(np.array(nats) / np.array(nbytes)) == gold))
    return {"correct": np.array(plain), "correct_norm": np.array(normal)}


@dataclass(frozen=True)
class PreparedChoices:
    """A choice task, tokenised for a model.

    Args:
        task: The task.
        questions: Its questions.
        batches: Indices of questions, batch by batch.
        vocabulary: Number of logits per token.
        budget: Largest number of input tokens of a batch.
    """

    task: ChoiceTask
    questions: Sequence[Encoded]
    batches: Sequence[Sequence[int]]
    vocabulary: int
    budget: int

    def prompt(self, row: int) -> Sequence[int]:
        """Return the tokens of a question's context, without the choices."""
        return self.questions[row].context

    def measure(self, model: Any, rows: Sequence[int]) -> dict[str, Any]:
        """Score the questions of a batch."""
        return score(model, [self.questions[row] for row in rows])

    @property
    def items(self) -> Sequence[int]:
        """Identifier of each item: the number of the question."""
        return range(len(self.questions))

    def measure_items(self, model: Any, items: Sequence[int]) -> dict[str, list[float]]:
        """Score some questions on a loaded model; the same questions always share the same batches.

        Args:
            model: The model.
            items: Their indices.

        Returns:
            For each of them, whether the most likely choice is right, as in `right`.
        """
        asked = [self.questions[item] for item in items]
        grouped = _grouped_questions(asked, self.vocabulary, self.budget)
        contents = [score(model, [asked[i] for i in batch]) for batch in grouped]
        return {name: found.tolist() for name, found in right(in_order(grouped, contents)).items()}

    def outcome(self, contents: Sequence[Mapping[str, Any]]) -> Outcome:
        """Return the accuracies from the results of all batches."""
        rows = in_order(self.batches, contents)
        found, count = right(rows), len(self.questions)
        metrics = choice_metrics(found, (self.task.name, count))
        return Outcome(metrics, {**rows, **found}, count, {}, HIGHER)


HIGHER = {"accuracy": True, "accuracy_norm": True}
"""Whether higher is better, by metric; the main metric first."""


def choice_metrics(columns: Mapping[str, ArrayLike], items: Hashable) -> dict[str, Estimate]:
    """Return the accuracies from the measurements of questions.

    Args:
        columns: What `right` returns, one entry per question.
        items: Key of this set of questions.
    """
    one = np.ones(len(np.asarray(columns["correct"])))
    return {
        "accuracy": Estimate.of_ratio(columns["correct"], one, items),
        "accuracy_norm": Estimate.of_ratio(columns["correct_norm"], one, items),
    }


def _grouped_questions(questions: Sequence[Encoded], vocabulary: int, budget: int) -> list[list[int]]:
    fed = [len(q.context) + q.longest * len(q.choices) for q in questions]
    return batches(fed, [q.longest * len(q.choices) for q in questions], vocabulary, budget)


def prepare_choices(
    task: ChoiceTask, tokenizer: Tokenizer, *, positions: int | None, limit: int | None, vocabulary: int, budget: int
) -> PreparedChoices:
    """Tokenise a choice task and divide it into batches.

    Args:
        task: The questions.
        tokenizer: Tokenizer of the model.
        positions: As for `encode`.
        limit: As for `encode`.
        vocabulary: Number of logits per token.
        budget: Largest number of input tokens of a batch.

    Raises:
        TaskError: As for `encode`.
    """
    encoded = encode(task, tokenizer, positions, limit)
    return PreparedChoices(task, encoded, _grouped_questions(encoded, vocabulary, budget), vocabulary, budget)
