"""Methods on factors beside transcriptions of their papers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from merganser.factor_methods.lora_lego import clusters, lora_lego, units
from merganser.factor_methods.robust_merge import robust_merge
from merganser.method.factors import Factors
from merganser.method.registry import every_method, factor_method_names
from merganser.ops.random import Random, keys
from merganser.testing import check_citation
from tests.reference.lora_lego import assembled
from tests.reference.lora_lego import units as reference_units
from tests.reference.robust_merge import prune


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapters(*ranks: int, outputs: int = 10, inputs: int = 12) -> list[Factors]:
    return [Factors(draw(i, rank, inputs), draw(100 + i, outputs, rank), 0.5 + i) for i, rank in enumerate(ranks)]


def rng(count: int, seed: int = 0) -> Random:
    return Random(keys(seed, "module", count), torch.zeros((), dtype=torch.int64))


def test_lego_beside_the_paper() -> None:
    """Two clusters that are far apart, so that there is no doubt which units are together."""
    near = [
        Factors(draw(1, 1, 12) + 0.01 * draw(10 + i, 1, 12), draw(2, 10, 1) + 0.01 * draw(20 + i, 10, 1))
        for i in range(3)
    ]
    far = [Factors(7 * draw(3, 1, 12) + 0.01 * draw(30 + i, 1, 12), draw(4, 10, 1)) for i in range(2)]
    given = [*near, *far]
    found = lora_lego(given, rng(5), 2, weight=torch.ones(5), lambda_=torch.tensor(1.0))
    rows = [row for each in given for row in reference_units(each.a, each.b, each.scale)]
    expected = assembled(rows, [0, 0, 0, 1, 1], 12, [1] * 5)
    torch.testing.assert_close(found.product.double(), expected, rtol=1e-5, atol=1e-5)


def test_lego_units() -> None:
    """Whatever the factors of a product of rank one, the unit is the same."""
    a, b = draw(1, 3, 12), draw(2, 10, 3)
    expected = units(Factors(a, b, 2.0), torch.tensor(0.5))
    stretch = torch.tensor([-3.0, 0.1, 5.0])
    found = units(Factors(a * stretch[:, None], b / stretch, 1.0), torch.tensor(1.0))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, torch.stack(reference_units(a, b, 1.0)))


@pytest.mark.parametrize("ranks", [(3, 3), (2, 4, 1)])
def test_lego_of_as_many_clusters_as_units_adds_up(ranks: tuple[int, ...]) -> None:
    given = adapters(*ranks)
    found = lora_lego(given, rng(len(given)), sum(ranks), weight=torch.ones(len(given)), lambda_=torch.tensor(1.0))
    expected = sum(each.product for each in given) * (sum(ranks) / len(ranks) / sum(ranks)) ** 0.5
    torch.testing.assert_close(found.product, expected, rtol=1e-4, atol=1e-4)


def test_lego_of_copies_is_the_adapter() -> None:
    (one,) = adapters(4)
    found = lora_lego([one] * 3, rng(3), None, weight=torch.ones(3), lambda_=torch.tensor(1.0))
    assert found.rank == 4
    torch.testing.assert_close(found.product, one.product, rtol=1e-4, atol=1e-4)


def test_clusters() -> None:
    points = torch.cat([torch.zeros(4, 3), torch.ones(3, 3), torch.full((2, 3), 5.0)]).double() + 0.01 * draw(0, 9, 3)
    for seed in range(5):
        labels = clusters(points, 3, draw(seed, 3).sigmoid()).tolist()
        assert [len(set(labels[i:j])) for i, j in ((0, 4), (4, 7), (7, 9))] == [1, 1, 1]
        assert len(set(labels)) == 3
    same = torch.ones(5, 3, dtype=torch.float64)
    assert clusters(same, 3, torch.tensor([0.9, 0.9, 0.9])).max() < 3


@pytest.mark.parametrize("density", [0.2, 0.05, 1.0])
def test_robust_merge_beside_the_paper(density: float) -> None:
    given = adapters(4, 4, 4)
    found = robust_merge(
        given,
        weight=torch.full((3,), 2.0),
        lambda_=torch.tensor(1.0),
        density=torch.tensor(density, dtype=torch.float64),
        scale_quantile=torch.tensor(0.8),
    )
    a_sum, b_sum, s_sum = 0.0, 0.0, 0.0
    for each in given:
        pruned = prune(each.a.double(), density)
        ratios = [
            float(x.abs().sum() / y.abs().sum()) if y.any() else 0.0
            for x, y in zip(each.a.double(), pruned, strict=True)
        ]
        s = torch.tensor(ratios).double()
        s = s.clamp(min=float(s.sort().values[3]))
        a_sum = a_sum + 2 * pruned
        b_sum = b_sum + 2 * prune(each.b.double(), density) * s * each.scale
        s_sum = s_sum + s
    torch.testing.assert_close(found.product.double(), b_sum / s_sum @ a_sum, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", factor_method_names())
def test_citations(name: str) -> None:
    check_citation(every_method()[name], Path(__file__).parents[2] / "references.bib")
