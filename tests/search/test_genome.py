"""Populations of merges: against the literal form, their laws, and that no trial hangs on the order in which others end."""

from __future__ import annotations

import random

import pytest

from merganser.search.samplers.genome import CHILDREN, SIZE, cross, fitness, mutate, population, propose_genome, survive
from merganser.search.samplers.own import Past, from_unit, to_unit
from merganser.search.space.dimension import Dimension
from tests.reference import genome as reference

SPACE = [Dimension(f"parameters.weight[{name}]", 0.0, 1.0, parameter="weight", per_model=True) for name in "abcd"]
MIXED = [Dimension("x", -1.0, 1.0), Dimension("c", 0, 2, choices=("p", "q", "r"))]


def test_against_the_reference() -> None:
    values = [0.3, -0.2, 0.9, 0.4]
    assert fitness(values) == pytest.approx(reference.shares(values))
    assert fitness([2.0, 2.0]) == reference.shares([2.0, 2.0])
    a, b = [0.1, 0.2, 0.3, 0.4], [0.9, 0.7, 0.5, 0.3]
    assert cross(SPACE, a, b, 0.75, random.Random(0)) == pytest.approx(reference.child(a, b, 3.0, 1.0))
    # the mixture of two merges is the merge by the mixture of their weights
    people = [Past(i, (0.0,), (float(v),)) for i, v in enumerate([3, 7, 1, 9, 4, 2, 8, 6, 5, 0, 11, 10, -1])]

    class Draws(random.Random):
        """Keeps what was drawn."""

        def sample(self, of: list[Past], k: int) -> list[Past]:  # type: ignore[override]
            found = super().sample(of, k)
            drawn.append([each.number for each in found])
            return found

    drawn: list[list[int]] = []
    alive = survive(people, Draws(1))
    assert [each.number for each in alive] == reference.survivors(
        [p.values[0] for p in people if p.values], SIZE, drawn
    )
    assert len({each.number for each in alive}) == SIZE
    assert alive[0].number == 10


def test_it_begins_with_pairs() -> None:
    places = [tuple(propose_genome(SPACE, {}, number, 5)) for number in range(1, SIZE)]
    assert all(sorted(place) == [0.0, 0.0, 0.5, 0.5] for place in places[:6])
    assert len(set(places)) == SIZE - 1
    # of four models there are six pairs; then all have shares
    assert [sum(place) for place in places[6:]] == pytest.approx([1.0] * 3)
    # two models have one pair, which is the start of a search
    assert len({tuple(propose_genome(SPACE[:2], {}, number, 5)) for number in range(1, SIZE)}) == SIZE - 1
    other = propose_genome([*SPACE, *MIXED], {}, 3, 5)
    assert sorted(other[:4]) == [0.0, 0.0, 0.5, 0.5]


def test_mutants_differ_and_stay_inside() -> None:
    draws = random.Random(0)
    for _ in range(200):
        x, c = mutate(MIXED, (0.02, to_unit(MIXED[1], 1)), draws)
        assert (x, c) != (0.02, 0.5)
        assert 0.0 <= x <= 1.0
        assert from_unit(MIXED[1], c) in (0, 1, 2)
    found = [cross(MIXED, (0.0, to_unit(MIXED[1], 0)), (1.0, to_unit(MIXED[1], 2)), 0.8, draws) for _ in range(300)]
    assert [x for x, _ in found] == pytest.approx([0.2] * 300)
    assert 200 < sum(from_unit(MIXED[1], c) == 0 for _, c in found) < 280


def test_the_fit_have_more_children() -> None:
    past = {i: Past(i, (i / 10,), (float(i),)) for i in range(SIZE)}
    found = [propose_genome(SPACE[:1], past, SIZE + slot, seed)[0] for slot in range(5) for seed in range(60)]
    # of parents drawn alike the mean would be 0.45
    assert sum(found) / len(found) > 0.55


def test_those_that_are_not_over_are_not_waited_for() -> None:
    past = {i: Past(i, (i / 40,), (float(i % 11),)) for i in range(SIZE + 2 * CHILDREN)}
    whole = propose_genome(SPACE[:1], past, SIZE + 2 * CHILDREN, 0)
    missing = {n: each for n, each in past.items() if n not in (3, SIZE + 1)}
    assert 0.0 <= propose_genome(SPACE[:1], missing, SIZE + 2 * CHILDREN, 0)[0] <= 1.0
    assert propose_genome(SPACE[:1], dict(reversed(past.items())), SIZE + 2 * CHILDREN, 0) == whole
    assert len(population(past, 2, 0)) == SIZE
    failed = {n: Past(n, each.at, None) for n, each in past.items()}
    assert population(failed, 2, 0) == []
