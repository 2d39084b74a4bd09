"""Coefficients of new tokens against the float64 references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from merganser.transplant.approximate import METHODS
from merganser.transplant.neighbours import sparsemax
from merganser.transplant.omp import _Matrix, matching_pursuit
from tests.transplant import literal

SOLVED = ["omp", "interpolate", "barycentric", "wechsel", "focus"]


def space(seed: int, v: int = 700, n: int = 40, d: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths, and vectors that are combinations of a few of them plus noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(v, d, generator=generator) * (0.5 + torch.rand(v, 1, generator=generator))
    mix = torch.randn(n, v, generator=generator) * (torch.rand(n, v, generator=generator) < 6 / v)
    return mix @ rows + 0.2 * torch.randn(n, d, generator=generator), rows


def terms(indices: torch.Tensor, weights: torch.Tensor) -> dict[int, float]:
    return {i: w for i, w in zip(indices.tolist(), weights.tolist(), strict=True) if w}


@pytest.mark.parametrize("name", SOLVED)
def test_coefficients(name: str) -> None:
    targets, rows = space(0)
    k = 12 if name != "focus" else 700
    solve = METHODS[name].solve
    assert solve is not None
    indices, weights = solve(targets, rows, k)
    for i, target in enumerate(targets.double().numpy()):
        wanted = getattr(literal, name)(target, rows.double().numpy(), k)
        found = terms(indices[i], weights[i])
        assert found.keys() == wanted.keys()
        for row, weight in wanted.items():
            assert found[row] == pytest.approx(weight, rel=1e-4, abs=1e-6)


def test_omp_in_bfloat16_chooses_what_float32_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, rows = space(1, v=3000, n=300)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("merganser.transplant.omp._fastest", lambda _, dtype=dtype: dtype)
        found.append(matching_pursuit(targets, rows, 16))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_omp_where_many_products_are_nearly_equal() -> None:
    """More rows than candidates lie within the rounding of bfloat16, and the largest is still found."""
    base = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    rows = base * (1 + torch.arange(400)[:, None] * 1e-6) + 0
    matrix = _Matrix(rows[torch.randperm(400, generator=torch.Generator().manual_seed(1))], torch.bfloat16)
    best = matrix.best(base)
    assert torch.equal(matrix.rows[best[0]], rows[399])


def test_omp_threads_do_not_matter() -> None:
    targets, rows = space(2, n=600)
    one, three = (matching_pursuit(targets, rows, 8, threads=threads) for threads in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_omp_of_a_row_is_that_row() -> None:
    _, rows = space(3)
    indices, weights = matching_pursuit(rows[:5] * 2, rows, 4)
    for i in range(5):
        assert terms(indices[i], weights[i]) == {i: pytest.approx(2.0, rel=1e-6)}


def test_omp_is_exact_in_the_span_of_few_rows() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    target = 3 * rows[7] - 2 * rows[20] + rows[41]
    indices, weights = matching_pursuit(target[None], rows, 10)
    found = terms(indices[0], weights[0])
    assert found == {7: pytest.approx(3, rel=1e-5), 20: pytest.approx(-2, rel=1e-5), 41: pytest.approx(1, rel=1e-5)}


def test_omp_residual_falls_with_k() -> None:
    targets, rows = space(5)
    errors = []
    for k in (1, 4, 16, 47):
        indices, weights = matching_pursuit(targets, rows, k)
        made = (rows[indices].double() * weights[:, :, None]).sum(1)
        errors.append((made - targets.double()).norm(dim=1))
    assert all(bool((after <= before + 1e-9).all()) for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("k", [5, 100])
def test_omp_of_few_rows_and_of_zero(k: int) -> None:
    rows = torch.eye(3)
    indices, weights = matching_pursuit(torch.tensor([[0.0, 0, 0], [1, 0, 2]]), rows, k)
    assert indices.shape == (2, 3)
    assert terms(indices[0], weights[0]) == {}
    assert terms(indices[1], weights[1]) == {2: pytest.approx(2), 0: pytest.approx(1)}


def test_omp_of_dependent_rows() -> None:
    rows = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 1, 0]])
    indices, weights = matching_pursuit(torch.tensor([[4.0, 1, 1]]), rows, 3)
    assert terms(indices[0], weights[0]) == {1: pytest.approx(2), 2: pytest.approx(1)}


def test_interpolation_at_a_row_is_that_row() -> None:
    _, rows = space(6)
    for name in ("interpolate", "barycentric"):
        solve = METHODS[name].solve
        assert solve is not None
        indices, weights = solve(rows[:3], rows, 5)
        made = (rows[indices].double() * weights[:, :, None]).sum(1)
        torch.testing.assert_close(made.float(), rows[:3], rtol=1e-5, atol=1e-5)


def test_sparsemax() -> None:
    found = sparsemax(torch.tensor([[2.0, 1.5, 0.1], [0.1, 0.1, 0.1]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25, 0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64))
    assert np.allclose(found.sum(1), 1)
