"""Sums over tokens, whatever their width and however they are divided."""

from __future__ import annotations

import pytest
import torch

from merganser.calibration.sums.reducers import REDUCERS, products_of

LITERAL = {
    "magnitude": lambda rows: rows.abs().sum(0),
    "second_moment": lambda rows: rows.square().sum(0),
    "gram": lambda rows: rows.T @ rows,
}


# widths below, at and above those of the panels that a Gram matrix is summed in
@pytest.mark.parametrize("width", [1, 255, 256, 257, 600, 1100])
@pytest.mark.parametrize("name", REDUCERS)
def test_sums_are_those_of_the_definition(name: str, width: int) -> None:
    rows = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    reducer = REDUCERS[name](width)
    for part in rows.split([1, 7, 32]):
        reducer.add(part)
    shape = reducer.shape_of(width)
    found = reducer.result()
    assert found.shape == shape
    torch.testing.assert_close(found.double(), LITERAL[name](rows.double()), rtol=1e-5, atol=1e-5)
    if found.dim() == 2:
        assert torch.equal(found, found.T)


@pytest.mark.parametrize("name", REDUCERS)
def test_many_small_batches_lose_nothing(name: str) -> None:
    """Across batches sums are float64: in float32 a million times 1 would still be exact, and 1 + 1e-8 not."""
    reducer = REDUCERS[name](2)
    reducer.add(torch.full((1, 2), 4096.0))
    for _ in range(2000):
        reducer.add(torch.full((1, 2), 0.03125))
    total = reducer.result().double()
    expected = 4096 + 2000 * 0.03125 if name == "magnitude" else 4096.0**2 + 2000 * 0.03125**2
    torch.testing.assert_close(total, torch.full_like(total, expected), rtol=6e-8, atol=0)


def test_products_of_bfloat16_are_exact() -> None:
    rows = torch.randn(64, 600, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    before = torch.backends.mkldnn.matmul.fp32_precision
    reducer = REDUCERS["gram"](600)
    with products_of(torch.bfloat16):
        reducer.add(rows)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    # one rounding of a sum to bfloat16 would show: it keeps three digits
    expected = rows.double().T @ rows.double()
    torch.testing.assert_close(reducer.result().double(), expected, rtol=1e-5, atol=1e-5)
