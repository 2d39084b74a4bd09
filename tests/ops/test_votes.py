import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.ops.votes import agreeing_sum, disjoint_mean, elect_sign

finite = st.floats(-100, 100, allow_nan=False, width=32)
# products with what float32 has are not so small that the vote takes them for 0
weights_of_a_vote = st.floats(-2, 2, allow_nan=False).map(lambda weight: weight if abs(weight) > 1e-200 else 0.0)
UNIT = torch.ones(3, dtype=torch.float64)


def column(*entries):
    """One element, of several models."""
    return [torch.tensor([float(entry)]) for entry in entries]


@pytest.mark.parametrize(
    ("entries", "positive"),
    [((1, 2, -4), False), ((1, 2, -2), True), ((1, 2, -3), True), ((0, 0, 0), True), ((-1, 0, 0), False)],
)
def test_elects_the_sign_of_the_sum_and_plus_on_a_tie(entries, positive):
    assert elect_sign(column(*entries)).item() is positive
    assert elect_sign(column(*entries), UNIT).item() is positive


def test_a_weight_is_a_say_and_a_negative_one_turns_the_vote():
    entries = column(1, -2)
    assert not elect_sign(entries)
    assert elect_sign(entries, torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert elect_sign(entries, torch.tensor([1.0, -1.0], dtype=torch.float64))


def test_the_vote_is_not_rounded_to_float32():
    # in float32 both products are 0.3, and the tie would elect plus
    a, b = torch.tensor([1.0]), torch.tensor([-1.0])
    weight = torch.tensor([0.3, 0.3 + 1e-12], dtype=torch.float64)
    assert not elect_sign([a, b], weight)
    assert elect_sign([a, b], weight.flip(0))
    # 2**25 - 1 - 2**25: nothing below 2 is left of it in float32
    assert not elect_sign(column(2.0**25, -1, -(2.0**25)))


def test_a_vote_is_seen_unless_it_is_next_to_nothing():
    for size, seen in ((2.0**-1049, True), (2.0**-1051, False)):
        assert elect_sign([torch.tensor([-size], dtype=torch.float64)]).item() is not seen


def test_a_tie_of_decimal_weights_is_one():
    # multiples of one step, as differences of 16-bit weights are
    step = 2.0**-13
    for k in range(1, 60):
        assert elect_sign(column(k * step, -k * step), torch.tensor([0.3, 0.3], dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(finite, weights_of_a_vote), min_size=1, max_size=5), st.booleans())
def test_the_mean_by_hand(pairs, normalize):
    entries, weights = zip(*pairs, strict=True)
    weighted = [w * e for e, w in pairs]
    plus = sum(weighted) >= 0
    chosen = [(x, w) for x, w in zip(weighted, weights, strict=True) if (x > 0 if plus else x < 0)]
    total, count = sum(x for x, _ in chosen), sum(w for _, w in chosen)
    expected = total / (count or 1) if normalize else total
    tensors = [torch.tensor([e], dtype=torch.float64) for e in entries]
    found = disjoint_mean(tensors, torch.tensor(weights, dtype=torch.float64), torch.float64, normalize=normalize)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


def test_nobody_agrees_with_nothing():
    total, weights = agreeing_sum(column(0, 0, 0), UNIT, torch.tensor([True]), torch.float32)
    assert total.item() == 0
    assert weights.item() == 1


def test_weights_that_cancel_do_not_divide():
    weight = torch.tensor([1.0, -1.0], dtype=torch.float64)
    # both say plus, one by a negative weight: 2 * 1 + (-3) * (-1) = 5
    assert disjoint_mean(column(2, -3), weight, torch.float32, normalize=True).item() == 5


def test_zeros_do_not_count():
    assert disjoint_mean(column(3, 0, -1), UNIT, torch.float32, normalize=True).item() == 3
    assert disjoint_mean(column(3, 1, -1), UNIT, torch.float32, normalize=True).item() == 2
    assert disjoint_mean(column(3, 1, -1), UNIT, torch.float32, normalize=False).item() == 4


def test_the_mean_has_the_dtype_asked_for():
    for dtype in (torch.float32, torch.float64):
        tensors = [torch.ones(5, dtype=dtype), torch.ones(5, dtype=dtype)]
        for normalize in (True, False):
            assert disjoint_mean(tensors, UNIT[:2], dtype, normalize=normalize).dtype == dtype


def test_the_vote_sees_what_the_mean_does_not():
    # 1 + 2**-30 outvotes 1, though both are 1 in float32
    close = [torch.tensor([-1 - 2.0**-30], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    assert disjoint_mean(close, UNIT[:2], torch.float32, normalize=True).item() == -1
    assert disjoint_mean([tensor.float() for tensor in close], UNIT[:2], torch.float32, normalize=True).item() == 1
