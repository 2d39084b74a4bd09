"""What a blend found: for each prompt, and over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .generation import Answer
from .prompts import Prompt

__all__ = ["Blended", "Line", "Scored", "summarise"]


@dataclass
class Scored:
    """An answer of a model, and its score; None if there is no ranker."""

    model: str
    answer: Answer
    score: float | None


@dataclass
class Line:
    """A prompt with all answers.

    Args:
        prompt: The prompt.
        answers: Those of all models.
        chosen: Index of the one with the highest score, of several the first; None without a ranker.
        fused: What the fuser wrote; None without one, or if no answer fits into what it can see.
        fused_score: Its score.
        shown: Indices of the answers that the fuser saw.
    """

    prompt: Prompt
    answers: list[Scored]
    chosen: int | None = None
    fused: Answer | None = None
    fused_score: float | None = None
    shown: Sequence[int] = field(default_factory=list)

    def rank(self, scores: Sequence[float]) -> None:
        """Give every answer its score, and choose the best."""
        for own, score in zip(self.answers, scores, strict=True):
            own.score = score
        self.chosen = self.order()[0]

    def order(self) -> list[int]:
        """Return the indices of the answers, the best first; as the models were named without scores."""
        scores = [0.0 if own.score is None else own.score for own in self.answers]
        return sorted(range(len(scores)), key=lambda i: -scores[i])

    def to_json(self) -> dict[str, Any]:
        """Return the line that is written."""
        answers = [
            {"model": own.model, "text": own.answer.text, "ended": own.answer.ended, "score": own.score}
            for own in self.answers
        ]
        fused = None
        if self.fused is not None:
            fused = {
                "text": self.fused.text,
                "ended": self.fused.ended,
                "score": self.fused_score,
                "answers": list(self.shown),
            }
        return {**self.prompt.given, "answers": answers, "chosen": self.chosen, "fused": fused}


@dataclass(frozen=True)
class Blended:
    """What a blend found. Scores are those of the ranker, means over prompts; None without one.

    Args:
        out: The file.
        kept: The file in which answers are kept.
        prompts: Number of prompts.
        one: For each model the score of an answer of it.
        best: For each model that of the best of its answers (best-of-K).
        times: For each model the number of prompts for which an answer of it was chosen.
        chosen: Score of the chosen answer, of all models.
        fused: Score of what the fuser wrote, over the prompts for which it did.
        unwritten: Number of prompts for which there is a fuser that did not.
        cut: Number of answers that the models did not end themselves.
    """

    out: Path
    kept: Path
    prompts: int
    one: dict[str, float | None]
    best: dict[str, float | None]
    times: dict[str, int]
    chosen: float | None
    fused: float | None
    unwritten: int
    cut: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        names = ("prompts", "one", "best", "times", "chosen", "fused", "unwritten", "cut")
        return {"out": str(self.out), "kept": str(self.kept), **{name: getattr(self, name) for name in names}}


def summarise(out: Path, kept: Path, models: Sequence[str], lines: Sequence[Line], *, fuser: bool) -> Blended:
    """Return the means over all prompts.

    Args:
        out: The file.
        kept: The file in which answers are kept.
        models: Names of the models.
        lines: What was found.
        fuser: Whether there is a fuser.
    """
    by_model = {name: [[own.score for own in line.answers if own.model == name] for line in lines] for name in models}
    chosen = [None if line.chosen is None else line.answers[line.chosen] for line in lines]
    written = [line for line in lines if line.fused is not None]
    return Blended(
        out,
        kept,
        len(lines),
        {name: _mean(_mean(each) for each in own) for name, own in by_model.items()},
        {name: _mean(_largest(each) for each in own) for name, own in by_model.items()},
        {name: sum(own is not None and own.model == name for own in chosen) for name in models},
        _mean(None if own is None else own.score for own in chosen),
        _mean(line.fused_score for line in written),
        len(lines) - len(written) if fuser else 0,
        sum(not own.answer.ended for line in lines for own in line.answers),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, None if there are no values or one is not known."""
    found: list[float] = []
    for value in values:
        if value is None:
            return None
        found.append(value)
    return math.fsum(found) / len(found) if found else None


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known, default=None)
