import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import ParameterError
from merganser.methods.btm import btm, domain_probabilities
from merganser.methods.linear import linear
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.btm import btm as reference
from tests.reference.btm import posterior_of

POSTERIOR = [0.1, 0.62, 0.0, 0.28]


@pytest.mark.parametrize("top_k", [0, 1, 2, 3, 4])
def test_reaches_the_bars(top_k):
    _, models = make_models((80, 125), 4)
    assert_reaches_bars(btm, reference, None, models, {"posterior": POSTERIOR, "top_k": top_k})


def test_reaches_the_bars_with_16_models():
    _, models = make_models((80, 125), 16)
    assert_reaches_bars(btm, reference, None, models, {"posterior": [1 + i % 3 for i in range(16)], "top_k": 7})


def test_by_hand():
    models = [torch.tensor([x]) for x in (10.0, 20.0, 60.0)]

    def merged(**given):
        return merge_tensor(btm, None, models, given).item()

    assert merged(posterior=[0.5, 0.3, 0.2]) == pytest.approx(23)
    assert merged(posterior=[0.5, 0.3, 0.2], top_k=2) == pytest.approx((5 + 6) / 0.8)
    assert merged(posterior=[0.2, 0.3, 0.3], top_k=1) == 20


LOSSES = [[3.0, 2.0, 5.0, 1.0], [2.5, 2.5, 9.0, 1.0], [7.0, 1.0, 4.5, 1.0]]


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prior", [[1.0, 1.0, 1.0], [0.2, 0.0, 3.0]])
def test_the_posterior_is_that_of_the_reference(smoothing, prior):
    found = domain_probabilities(LOSSES, prior, smoothing)
    assert found == pytest.approx(posterior_of(LOSSES, prior, smoothing), rel=1e-12)
    assert sum(found) == pytest.approx(1)
    _, models = make_models((30, 10), 3)
    merged = merge_tensor(btm, None, models, {"posterior": prior, "smoothing": smoothing}, data={"losses": LOSSES})
    torch.testing.assert_close(merged.double(), reference(None, models, posterior=found), rtol=1e-6, atol=1e-6)


def test_unlikely_texts_do_not_underflow():
    # an expert that is better by 2000 nats has the text to itself, and equal ones share it
    assert domain_probabilities([[9000.0, 5000.0], [7000.0, 5000.0]], [1.0, 1.0], 0.0) == pytest.approx((0.25, 0.75))
    # what counts least is the order: the last sequence has the share of the smoothing
    assert domain_probabilities([[0.0, 900.0], [900.0, 0.0]], [1.0, 1.0], 0.3) == pytest.approx((0.7, 0.3))


def test_all_experts_are_those_of_linear():
    _, models = make_models((30, 10), 4)
    expected = merge_tensor(linear, None, models, {"weight": POSTERIOR})
    for given in ({"posterior": POSTERIOR}, {"posterior": [x * 1e307 for x in POSTERIOR], "top_k": 4}):
        torch.testing.assert_close(merge_tensor(btm, None, models, given), expected)
    assert torch.equal(merge_tensor(btm, None, models, {"posterior": POSTERIOR, "top_k": 1}), models[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"posterior": [0.0, 0.0]}, "posterior is 0 for every model"),
        ({"posterior": [0.4, 0.6], "top_k": 3}, "top_k must be at most the number of models, 2, got 3"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    _, models = make_models((3,), 2)
    with pytest.raises(ParameterError, match=message):
        merge_tensor(btm, None, models, given)
