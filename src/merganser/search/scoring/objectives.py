"""What a search improves: metrics of tasks, what is retained of experts, figures of an external command; and bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ...errors import TaskError, did_you_mean
from ...evaluation.scoring.estimate import Estimate, mean

Figures: TypeAlias = "Mapping[str, Estimate]"
"""The figures of a model by name, as objectives name them: `TASK/METRIC`, `recovered/mean`, a key of a command."""

Direction = Literal["maximize", "minimize"]

_TERM = re.compile(r"(?:([0-9.eE+-]+)\*)?(.+)")


@dataclass(frozen=True, slots=True)
class Objective:
    """A figure, or a weighted sum of figures, to improve.

    Args:
        text: As written.
        terms: Weight and name of each figure.
        direction: Whether higher or lower is better.
    """

    text: str
    terms: tuple[tuple[float, str], ...]
    direction: Direction

    @property
    def sign(self) -> float:
        """1 where higher is better, else -1."""
        return 1.0 if self.direction == "maximize" else -1.0

    def value(self, figures: Figures) -> Estimate:
        """Return the objective from the figures of a model."""
        weight, name = self.terms[0]
        total = figures[name] * weight
        for weight, name in self.terms[1:]:
            total = total + figures[name] * weight
        return total


@dataclass(frozen=True, slots=True)
class Bound:
    """A limit on a figure.

    Args:
        name: Name of the figure.
        limit: The limit.
        at_least: Whether the figure must be at least the limit; otherwise at most.
    """

    name: str
    limit: float
    at_least: bool

    def excess(self, figures: Figures) -> float:
        """Return by how much a figure misses the limit: 0 or less if it keeps it."""
        value = figures[self.name].value
        return self.limit - value if self.at_least else value - self.limit

    def __str__(self) -> str:
        return f"{self.name} {'at least' if self.at_least else 'at most'} {self.limit:g}"


def parse_objectives(texts: Sequence[str], known: Mapping[str, bool] | None, default: str | None) -> list[Objective]:
    """Read objectives: `NAME`, `0.5*NAME+NAME`, with `:maximize` or `:minimize` behind it.

    Args:
        texts: The objectives as written; none for the default.
        known: Whether higher is better, by name of the known figures; None if the figures are those of a command, whose
            direction must be written.
        default: The objective if there are none.

    Raises:
        TaskError: A figure is not known, the direction is missing or wrong, or there is no default.
    """
    if not texts:
        if default is None:
            raise TaskError(
                "objective: none given, and the figures here are not alike, so their mean has no meaning; give "
                f"--objective with one of: {', '.join(known or ())}"
                if known is not None
                else "objective: a command has no default; give --objective NAME:maximize or NAME:minimize, where NAME "
                "is a key of the JSON that it prints"
            )
        texts = [default]
    found = [_objective(text, known) for text in texts]
    twice = next((o.text for o in found if [other.terms for other in found].count(o.terms) > 1), None)
    if twice is not None:
        raise TaskError(f"objective: {twice!r} is given twice")
    return found


def _objective(text: str, known: Mapping[str, bool] | None) -> Objective:
    body, colon, word = text.partition(":")
    if colon and word not in ("maximize", "minimize"):
        raise TaskError(f"objective: {text!r} must end in :maximize or :minimize, or in no colon")
    terms = []
    for part in body.split("+"):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise TaskError(f"objective: {text!r} has an empty term; write NAME, or a sum such as 0.5*NAME+NAME")
        weight = 1.0 if match[1] is None else _number(match[1], f"objective: {text!r}")
        if weight <= 0:
            raise TaskError(f"objective: {text!r}: a weight must be above 0; :minimize turns the direction")
        terms.append((weight, match[2].strip()))
    names = [name for _, name in terms]
    given: Direction | None = {"maximize": "maximize", "minimize": "minimize"}.get(word)  # type: ignore[assignment]
    if known is None:
        if given is None:
            raise TaskError(
                f"objective: {text!r}: whether higher or lower is better is missing; write {text}:maximize or "
                f"{text}:minimize"
            )
        return Objective(text, tuple(terms), given)
    directions = {name: _direction(name, known) for name in names}
    if len(set(directions.values())) > 1:
        raise TaskError(
            f"objective: {text!r} adds figures of which some are better high and others low; give two objectives"
        )
    own = directions[names[0]]
    if given is not None and given != own:
        raise TaskError(f"objective: {text!r}: {names[0]} is better {'higher' if own == 'maximize' else 'lower'}")
    return Objective(text, tuple(terms), own)


def parse_bounds(at_least: Sequence[str], at_most: Sequence[str], known: Mapping[str, bool] | None) -> list[Bound]:
    """Read bounds, each `NAME=NUMBER`.

    Args:
        at_least: Lower bounds.
        at_most: Upper bounds.
        known: As for `parse_objectives`.

    Raises:
        TaskError: A bound is malformed, or its figure is not known.
    """
    bounds = []
    for option, texts in (("at-least", at_least), ("at-most", at_most)):
        for text in texts:
            name, equals, number = text.rpartition("=")
            if not equals or not name:
                raise TaskError(f"{option}: expected NAME=NUMBER, got {text!r}")
            if known is not None:
                _direction(name, known)
            bounds.append(Bound(name, _number(number, f"{option}: {text!r}"), option == "at-least"))
    return bounds


def _direction(name: str, known: Mapping[str, bool]) -> Direction:
    if name not in known:
        raise TaskError(
            f"objective: {name!r} is not measured here.{did_you_mean(name, known)} Known: {', '.join(known)}"
        )
    return "maximize" if known[name] else "minimize"


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise TaskError(f"{where}: expected a number, got {text!r}") from None
    if not math.isfinite(value):
        raise TaskError(f"{where}: expected a finite number, got {text!r}")
    return value


def retained(
    own: Figures, base: Figures, experts: Mapping[str, Figures], mains: Mapping[str, tuple[str, bool]]
) -> dict[str, Estimate]:
    """Return what a model kept of experts and forgot of the base, as shares.

    Args:
        own: Figures of the model, by `TASK/METRIC`.
        base: Figures of the base on the same items.
        experts: Figures of the expert of each task that has one; those whose gain counts.
        mains: Main metric of each task, and whether higher is better.
    """
    found: dict[str, Estimate] = {}
    for task, expert in experts.items():
        name = f"{task}/{mains[task][0]}"
        # the direction cancels
        found[f"recovered/{task}"] = (base[name] - own[name]) / (base[name] - expert[name])
    if found:
        found |= {
            "recovered/mean": mean([*found.values()]),
            "recovered/worst": min(found.values(), key=lambda each: each.value),
        }
    lost = []
    for task, (metric, higher) in mains.items():
        name = f"{task}/{metric}"
        if task not in experts and base[name].value:
            loss = (base[name] - own[name]) if higher else (own[name] - base[name])
            found[f"forgotten/{task}"] = loss / (base[name] * math.copysign(1.0, base[name].value))
            lost.append(found[f"forgotten/{task}"])
    if lost:
        found["forgotten/mean"] = mean(lost)
    return found


def names_of_retained(domains: Collection[str], tasks: Collection[str]) -> dict[str, bool]:
    """Return the names of the figures of `retained`, and whether higher is better.

    Args:
        domains: Tasks with an expert whose gain counts.
        tasks: All tasks.
    """
    found = {"recovered/mean": True, "recovered/worst": True} if domains else {}
    found |= {f"recovered/{task}": True for task in domains}
    others = [task for task in tasks if task not in domains]
    if others:
        found |= {"forgotten/mean": False, **{f"forgotten/{task}": False for task in others}}
    return found
