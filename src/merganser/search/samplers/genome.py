"""A population of merges: children of two parents by their fitness, mutants, and survival by tournament, as in GENOME.

Source: Zhang et al., Nature-inspired population-based evolution of large language models, 2025, arXiv 2503.01155, and its published
code. There individuals are adapters: a child is the merge of its parents' weights, weighted by their fitness, and a mutant has noise on a
hundredth of them. Here individuals are the free values of a recipe, such as a weight for each adapter; since a merge by
weights is linear, a mixture of two such merges is the merge by the mixture of their weights, so no merge of merges is made. Mutation moves
free values, and not single elements of weights. Fitness is counted from just below the worst of the population, so that any objective
will do. The number of children of a generation is fixed; what the code leaves to chance there is which of them are mutants. The step of
GENOME+ that transfers experience between individuals is the sampler `particles`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

from ..space.dimension import Dimension
from .own import Past, chance, from_unit, to_unit

SIZE = 10
"""Individuals of a population; the trials of the first generation."""
_PAIRS, _MUTANTS = SIZE // 2, 2
CHILDREN = _PAIRS + _MUTANTS
"""Trials of each later generation."""
_CROSSING = 0.8
_ELITES = 1
_TOURNAMENT = 3
_GENE, _STEP = 0.5, 0.1
"""Probability that a value mutates, and the standard deviation of its step, as a share of its range."""
_SPARE = 0.1
"""Fitness of the worst, as a share of the population's spread."""


def propose_genome(
    dimensions: Sequence[Dimension], past: Mapping[int, Past], number: int, seed: int
) -> Sequence[float]:
    """Return the next place: as `Propose`.

    Of weights of models, the first trials give equal shares to two of them, another two each time, and random shares to all when there
    are no more pairs; other values begin at random.
    """
    if number < SIZE:
        return _first(dimensions, number, seed)
    draws = chance(seed, number)
    generation, slot = divmod(number - SIZE, CHILDREN)
    people = population(past, generation, seed)
    if len(people) < 2:
        return [draws.random() for _ in dimensions]
    shares = fitness([_worth(each) for each in people])
    if slot < _PAIRS and draws.random() <= _CROSSING:
        a = draws.choices(range(len(people)), shares)[0]
        b = draws.choices(range(len(people)), [0.0 if i == a else share for i, share in enumerate(shares)])[0]
        return cross(dimensions, people[a].at, people[b].at, shares[a] / (shares[a] + shares[b]), draws)
    return mutate(dimensions, draws.choice(people).at, draws)


def population(past: Mapping[int, Past], generation: int, seed: int) -> list[Past]:
    """Return who is alive after some generations, of the trials that are over and have a figure.

    Args:
        past: The trials.
        generation: Number of generations after the first.
        seed: Seed of the study.
    """
    people = [past[n] for n in range(SIZE) if n in past and past[n].value is not None]
    for step in range(1, generation + 1):
        first = SIZE + (step - 1) * CHILDREN
        born = [past[n] for n in range(first, first + CHILDREN) if n in past and past[n].value is not None]
        people = survive([*people, *born], chance(seed, -step))
    return people


def survive(people: Sequence[Past], draws: random.Random) -> list[Past]:
    """Return the elite, and the winners of tournaments among the others, each once, until the population is full."""
    ordered = sorted(people, key=lambda each: (-_worth(each), each.number))
    alive, left = ordered[:_ELITES], ordered[_ELITES:]
    while left and len(alive) < SIZE:
        winner = max(draws.sample(left, min(_TOURNAMENT, len(left))), key=_worth)
        alive.append(winner)
        left.remove(winner)
    return alive


def fitness(values: Sequence[float]) -> list[float]:
    """Return the share of each individual at being a parent; all the same if all are equally good."""
    low, spread = min(values), max(values) - min(values)
    found = [value - low + _SPARE * spread if spread else 1.0 for value in values]
    return [each / sum(found) for each in found]


def cross(
    dimensions: Sequence[Dimension], first: Sequence[float], second: Sequence[float], share: float, draws: random.Random
) -> list[float]:
    """Return the mixture of two places with a share of the first; a choice is that of the first with this probability."""
    return [
        (a if draws.random() < share else b) if dimension.choices is not None else share * a + (1 - share) * b
        for dimension, a, b in zip(dimensions, first, second, strict=True)
    ]


def mutate(dimensions: Sequence[Dimension], at: Sequence[float], draws: random.Random) -> list[float]:
    """Return a place with a normal step in some values, at least one; a choice becomes any other one."""
    moved = [draws.random() < _GENE for _ in dimensions]
    if not any(moved):
        moved[draws.randrange(len(moved))] = True
    found = []
    for dimension, x, moves in zip(dimensions, at, moved, strict=True):
        if moves and dimension.choices is not None:
            count = len(dimension.choices)
            other = (int(from_unit(dimension, x)) + draws.randrange(1, count)) % count
            x = to_unit(dimension, other)
        elif moves:
            x = min(max(x + draws.gauss(0.0, _STEP), 0.0), 1.0)
        found.append(x)
    return found


def _worth(trial: Past) -> float:
    return float("-inf") if trial.value is None else trial.value


def _first(dimensions: Sequence[Dimension], number: int, seed: int) -> list[float]:
    weights = [d.parameter == "weight" and d.per_model and d.choices is None for d in dimensions]
    # the part that names the model: `parameters.weight[a` of `parameters.weight[a][1/3]`, `models[0` of `models[0].parameters.weight`
    models = [d.name.partition("]")[0] for d in dimensions]
    known = [*dict.fromkeys(model for model, weight in zip(models, weights, strict=True) if weight)]
    pairs = [*itertools.combinations(known, 2)] if len(known) > 2 else []
    chance(seed, 0).shuffle(pairs)
    draws = chance(seed, number)
    drawn = [draws.expovariate(1.0) for _ in known]
    shares = {model: each / sum(drawn) for model, each in zip(known, drawn, strict=True)}
    if number <= len(pairs):
        shares = dict.fromkeys(known, 0.0) | dict.fromkeys(pairs[number - 1], 0.5)
    found = []
    for dimension, model, weight in zip(dimensions, models, weights, strict=True):
        value = min(max(shares[model], dimension.low), dimension.high) if weight else 0.0
        found.append(to_unit(dimension, value) if weight else draws.random())
    return found
