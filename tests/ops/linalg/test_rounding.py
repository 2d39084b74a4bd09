"""What rounding of stored weights puts into a task vector: against rounding itself."""

import pytest
import torch

from merganser.ops.linalg.rounding import (
    above_rounding,
    deltas_above_rounding,
    grid,
    rounding_in,
    rounding_norms,
    rounding_variance,
    triplets_above_rounding,
)
from merganser.ops.linalg.spectral import svd

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("saved", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_grid_is_that_of_the_values_and_not_of_the_file(dtype, saved):
    values = (0.03 * draw(50, 40)).to(dtype)
    if saved == dtype or saved.itemsize > dtype.itemsize:
        assert grid(values.to(saved)) == dtype
    assert grid(draw(50, 40)) == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_variance_is_that_of_rounding(dtype):
    exact = 0.03 * draw(400, 300)
    stored = exact.to(dtype)
    noise = (stored.double() - exact).square().mean()
    torch.testing.assert_close(rounding_variance(stored, dtype).mean(), noise, rtol=0.02, atol=0)


def test_a_unit_in_the_last_place_by_hand():
    stored = torch.tensor([1.0, -1.9921875, 2.0, 0.75, 0.0], dtype=torch.bfloat16)
    ulp = (12 * rounding_variance(stored, torch.bfloat16)).sqrt()
    assert ulp.tolist() == [2.0**-7, 2.0**-7, 2.0**-6, 2.0**-8, 0]


def test_below_the_normal_numbers_units_do_not_shrink():
    stored = torch.tensor([2.0**-14, 2.0**-20], dtype=torch.float16)
    assert (12 * rounding_variance(stored, torch.float16)).sqrt().tolist() == pytest.approx([2.0**-24] * 2)


def test_rows_are_rounded_each_by_itself():
    rows = torch.stack([(0.03 * draw(500, seed=i)).to(dtype).float() for i, dtype in enumerate(DTYPES)])
    expected = [rounding_variance(row, dtype).sum().sqrt() for row, dtype in zip(rows, DTYPES, strict=True)]
    torch.testing.assert_close(rounding_norms(rows), torch.stack(expected), rtol=1e-12, atol=0)
    assert rounding_norms(torch.zeros(3, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["even", "uneven rows and columns"])
@pytest.mark.parametrize("base_rounded", [False, True])
def test_the_largest_singular_value_of_rounding_is_below_the_bound_and_near_it(dtype, spread, base_rounded):
    exact = 0.03 * draw(150, 120) * (spread * draw(150, 1, seed=1)).exp() * (spread * draw(1, 120, seed=2)).exp()
    stored = exact.to(dtype)
    noise = stored.double() - exact
    if base_rounded:
        noise = noise - ((exact * 1.01).to(dtype).double() - exact * 1.01)
    largest, bound = float(torch.linalg.matrix_norm(noise, 2)), float(rounding_in(stored)[0])
    assert largest < bound < 4 * largest


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_rounding_is_the_expected_one(dtype):
    exact = 0.03 * draw(150, 120)
    stored = exact.to(dtype)
    noise = stored.double() - exact
    if dtype != torch.bfloat16:
        # the base was rounded, too
        noise = noise - ((exact * 1.01).to(dtype).double() - exact * 1.01)
    torch.testing.assert_close(rounding_in(stored)[1], noise.norm(), rtol=0.02, atol=0)
    assert rounding_in(torch.zeros(3, 0)).tolist() == [0, 0]


def limits(largest, norm=1e9):
    return torch.tensor([largest, norm], dtype=torch.float64)


def test_what_is_above_rounding_stays_bit_by_bit_where_nothing_is_cut():
    delta = draw(30, 20, dtype=torch.float32)
    assert above_rounding(delta, limits(1e-9)) is delta
    assert not above_rounding(delta, limits(1e9)).any()
    assert above_rounding(torch.zeros(30, 20), limits(1.0)).shape == (30, 20)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (12, 70), (1, 30), (300, 200)])
@pytest.mark.parametrize("cut", [1e-6, 1e-3, 0.03, 0.3])
def test_what_is_above_rounding_is_the_truncated_decomposition(shape, cut):
    left, right = (torch.linalg.qr(draw(size, min(shape), seed=i)).Q for i, size in enumerate(shape))
    values = torch.logspace(0, -8, min(shape), dtype=torch.float64)
    kept = values * (values > cut)
    found = above_rounding(((left * values) @ right.T).float(), limits(cut))
    torch.testing.assert_close(found.double(), (left * kept) @ right.T, rtol=0, atol=max(1e-6, 0.02 * cut))


def low_rank(base, rank, size):
    """A change of a base by a product of factors; `size` is its root mean square."""
    change = draw(len(base), rank, seed=3) @ draw(rank, base.shape[1], seed=4)
    return change * (size / change.square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_around_a_low_rank_change_is_cut_and_many_small_directions_are_not(dtype):
    base = (0.04 * draw(160, 120, seed=1)).to(dtype)
    ulp = 0.04 * torch.finfo(dtype).eps
    adapter = low_rank(base, 4, 20 * ulp)
    tuned = adapter + 0.5 * ulp * draw(160, 120, seed=2)
    # as small as it is, what was tuned everywhere is more than rounding makes
    models = [(base.double() + change).to(dtype) for change in (adapter, tuned)]
    rounding = torch.stack([rounding_in(model) for model in models])
    wide = [model.double() for model in (base, *models)]
    cut, kept = deltas_above_rounding(wide[0], wide[1:], rounding)
    assert torch.linalg.matrix_rank(cut) == 4
    assert torch.equal(kept, wide[2] - wide[0])
    for few in (None, 6):
        parts = triplets_above_rounding(wide[0], wide[1:], rounding, lambda delta, few=few: svd(delta, few))
        assert [len(part.values) for part in parts] == [4, few or 120]


def test_no_vectors_are_computed_where_nothing_is_cut(monkeypatch):
    base = 0.04 * draw(160, 120, seed=1)
    exact = (base + 0.00015 * draw(160, 120, seed=2)).to(torch.bfloat16)
    adapted = (base.to(torch.bfloat16).double() + low_rank(base, 4, 0.003)).to(torch.bfloat16)
    tuned, change = ((model.double() - base.to(torch.bfloat16).double()).float() for model in (exact, adapted))

    def refuse(matrix):
        raise AssertionError

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    assert above_rounding(tuned, rounding_in(exact)) is tuned
    with pytest.raises(AssertionError):
        above_rounding(change, rounding_in(adapted))


def test_wide_and_narrow_strips_have_the_same_rounding(monkeypatch):
    stored = (0.03 * draw(150, 120)).to(torch.bfloat16)
    expected = rounding_in(stored)
    for strip in (1, 1000):
        monkeypatch.setattr("merganser.ops.linalg.rounding._STRIP", strip)
        torch.testing.assert_close(rounding_in(stored), expected, rtol=1e-14, atol=0)


def test_a_tolerance_of_the_recipe_decides_by_itself():
    base, models = torch.zeros(30, 20), [draw(30, 20, seed=i, dtype=torch.float32) for i in range(2)]
    everything = torch.stack([limits(1e9), limits(0.0)])
    cut, whole = deltas_above_rounding(base, models, everything)
    assert not cut.any()
    assert torch.equal(whole, models[1])
    assert torch.equal(deltas_above_rounding(base, models, everything, unless=0.1)[0], models[0])


def test_where_nothing_is_above_rounding_nothing_is_cut():
    base, models = torch.zeros(30, 20), [draw(30, 20, seed=i, dtype=torch.float32) for i in range(2)]
    everything, one = torch.stack([limits(1e9)] * 2), torch.stack([limits(1e9), limits(0.0)])
    assert all(map(torch.equal, deltas_above_rounding(base, models, everything), models))

    def decompose(delta):
        return svd(delta, 5)

    def counts(*args, **options):
        return [len(part.values) for part in triplets_above_rounding(*args, decompose, **options)]

    assert counts(base, models, everything) == [5, 5]
    assert counts(base, models, one) == [0, 5]
    assert counts(base, models, one, unless=0.1) == [5, 5]
    assert counts(base, [base, base], everything) == [0, 0]
