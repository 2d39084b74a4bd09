import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.linear import linear
from merganser.methods.metrics_weighted import metrics_weighted
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.metrics_weighted import metrics_weighted as reference

LOSS = [1.9, 1.4, 1.6, 1.42]
SETTINGS = [
    {"metric": LOSS},
    {"metric": LOSS, "penalty": 0.0},
    {"metric": LOSS, "penalty": 7.5},
    {"metric": [200, 400, 600, 1000], "by": "step"},
    {"metric": [200, 400, 600, 1000], "by": "step", "penalty": 2.0},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_reaches_the_bars(parameters):
    _, models = make_models((80, 125), 4)
    assert_reaches_bars(metrics_weighted, reference, None, models, parameters)


def test_reaches_the_bars_with_16_models():
    _, models = make_models((80, 125), 16)
    assert_reaches_bars(metrics_weighted, reference, None, models, {"metric": [1 + i / 8 for i in range(16)]})


def test_by_hand():
    models = [torch.tensor([12.0]), torch.tensor([24.0])]

    def merged(**given):
        return merge_tensor(metrics_weighted, None, models, given).item()

    # 1/1 and 1/2, then 1 and 1/4
    assert merged(metric=[1, 2]) == pytest.approx(16)
    assert merged(metric=[1, 2], penalty=2) == pytest.approx(12 * 4 / 5 + 24 / 5)
    assert merged(metric=[1, 2], by="step") == pytest.approx(20)


def test_equal_metrics_or_no_penalty_give_the_uniform_soup():
    _, models = make_models((30, 10), 3)
    uniform = merge_tensor(linear, None, models, {"weight": 1})
    for given in ({"metric": 0.3}, {"metric": [1, 2, 3], "penalty": 0}):
        torch.testing.assert_close(merge_tensor(metrics_weighted, None, models, given), uniform)


def test_a_large_penalty_gives_the_best():
    _, models = make_models((30, 10), 3)
    for penalty in (1e6, 1e308):
        given = {"metric": [2.0, 1e-300, 1e300], "penalty": penalty}
        assert torch.equal(merge_tensor(metrics_weighted, None, models, given), models[1])
        assert torch.equal(merge_tensor(metrics_weighted, None, models, {**given, "by": "step"}), models[2])
