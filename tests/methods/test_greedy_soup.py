import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import ParameterError
from merganser.methods.greedy_soup import greedy_soup
from merganser.methods.linear import linear
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.greedy_soup import greedy_soup as reference

SCORE = [0.71, 0.64, 0.73, -2.5, 0.64]


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5])
def test_reaches_the_bars(keep):
    _, models = make_models((80, 125), 5)
    assert_reaches_bars(greedy_soup, reference, None, models, {"score": SCORE, "keep": keep})


def test_reaches_the_bars_with_16_models_of_a_million_elements():
    _, models = make_models((1000, 1000), 16)
    assert_reaches_bars(greedy_soup, reference, None, models, {"score": [(7 * i) % 16 for i in range(16)], "keep": 5})


def test_by_hand():
    models = [torch.full((2,), float(x)) for x in (1, 2, 4, 8)]
    found = [merge_tensor(greedy_soup, None, models, {"score": [3, 9, 4, 1], "keep": k})[0].item() for k in (1, 2, 3)]
    assert found == pytest.approx([2, 3, 7 / 3])


def test_of_equal_scores_the_first_is_kept():
    models = [torch.full((2,), float(x)) for x in (1, 2, 4, 8)]
    for score, keep, kept in (([5, 7, 5, 5], 2, (2 + 1) / 2), ([1, 1, 1, 1], 2, 1.5), ([0, 7, 7, 7], 1, 2)):
        assert merge_tensor(greedy_soup, None, models, {"score": score, "keep": keep})[0].item() == kept


def test_one_is_the_best_model_and_all_is_the_uniform_soup():
    _, models = make_models((30, 10), 3)
    given = {"score": [0.2, 0.9, 0.4]}
    assert torch.equal(merge_tensor(greedy_soup, None, models, {**given, "keep": 1}), models[1])
    uniform = merge_tensor(linear, None, models, {"weight": 1})
    torch.testing.assert_close(merge_tensor(greedy_soup, None, models, {**given, "keep": 3}), uniform)


def test_more_than_there_are_is_refused():
    _, models = make_models((3,), 2)
    with pytest.raises(ParameterError, match="keep must be at most the number of models, 2, got 3"):
        merge_tensor(greedy_soup, None, models, {"score": 1, "keep": 3})
