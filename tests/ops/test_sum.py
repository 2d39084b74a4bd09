import pytest
import torch

from merganser.ops.sum import check_total, deltas, l1_gain, l1_norms, not_negative, round_down, scaled, weighted_sum


def test_task_vectors():
    base = torch.tensor([1.0, 2.0])
    assert [d.tolist() for d in deltas(base, [base + 1, base * 2])] == [[1, 1], [1, 2]]


def test_weights_in_float64_do_not_widen():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])]
    total = weighted_sum(tensors, torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert total.dtype == torch.float32
    assert total.tolist() == [1.5, 3.0]


def test_a_weighted_sum_is_added_in_order():
    a, b, c = (torch.tensor([x]) for x in (1.0, 2.0**-24, 2.0**-24))
    one = torch.ones(3, dtype=torch.float64)
    assert weighted_sum([a, b, c], one).item() == 1
    assert weighted_sum([b, c, a], one).item() == 1 + 2.0**-23


@pytest.mark.parametrize("weights", [(0.0,), (1.0, -1.0), (0.1, 0.2, -0.3), (5e-324, 1e-40)])
def test_weights_that_add_up_to_0_are_complained_of_where_their_sum_divides(weights):
    for divides in ({}, {"normalize": True}, {"normalize_weights": True}):
        assert "add up to 0" in check_total({"weight": weights, **divides})
    for adds in ({"normalize": False}, {"normalize_weights": False}):
        assert check_total({"weight": weights, **adds}) is None


@pytest.mark.parametrize("weights", [(1.0,), (-2.0,), (1e-9, 1e-9), (1.0, -0.999)])
def test_other_weights_may_divide(weights):
    assert check_total({"weight": weights}) is None


def test_norms_add_over_blocks_in_float64():
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(1000, generator=generator) for _ in range(2)]
    after = [tensor * (tensor > 0) for tensor in before]
    norms = l1_norms(before, after)
    assert norms.dtype == torch.float64
    expected = [[sum(map(abs, tensor.tolist())) for tensor in group] for group in (before, after)]
    torch.testing.assert_close(norms, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    parts = [l1_norms([t[i] for t in before], [t[i] for t in after]) for i in (slice(0, 300), slice(300, 1000))]
    torch.testing.assert_close(sum(parts), norms, rtol=1e-14, atol=0)


def test_the_gain_restores_the_norm_unless_there_is_none():
    measured = torch.tensor([[6.0, 0.0, 1.0, 1e-8], [2.0, 0.0, 0.0, 1e-9]], dtype=torch.float64)
    assert l1_gain(measured).tolist() == [3, 1, 1, 1]


def test_scaling_by_nothing_changes_nothing():
    tensors = [torch.tensor([1.0]), torch.tensor([2.0])]
    assert [a is b for a, b in zip(scaled(tensors, None), tensors, strict=True)] == [True, True]
    assert [t.tolist() for t in scaled(tensors, torch.tensor([3.0, 5.0]))] == [[3], [10]]


@pytest.mark.parametrize("number", [1e-5, 0.1, 0.3, 1 / 3, 0.5, 0.0, -0.1, 1e-46])
def test_rounding_down_does_not_change_what_is_above(number):
    value = torch.tensor(number, dtype=torch.float64)
    rounded = round_down(value, torch.float32)
    assert rounded.dtype == torch.float32
    above = torch.nextafter(rounded, torch.tensor(torch.inf))
    assert rounded.double() <= value < above.double()
    assert torch.equal(round_down(value, torch.float64), value)


def test_signs_of_numbers_beyond_float32():
    values = torch.tensor([0.0, -0.0, 1e-300, -1e-300, 1e300, -1e300, torch.inf, -torch.inf], dtype=torch.float64)
    assert not_negative(values).tolist() == [True, True, True, False, True, False, True, False]
