import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.breadcrumbs import breadcrumbs
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.breadcrumbs import breadcrumbs as reference

WEIGHT = [0.5, 0.3, 0.4]
SETTINGS = [
    {},
    {"density": [0.1, 0.5, 0.9]},
    {"density": [0.15, 0.5, 1.0], "gamma": [0.006, 0.2, 0.3], "lambda": 0.2},
    {"density": [0.0, 0.5, 0.9], "gamma": [0.1, 0.0, 1.0]},
    {"density": [0.1, 0.5, 0.9], "normalize": True},
    {"density": [0.1, 0.5, 0.9], "rescale": True},
    {"density": [0.15, 0.5, 1.0], "gamma": [0.006, 0.2, 0.3], "precedence": "density"},
    {"density": [0.15, 0.5, 1.0], "gamma": [0.006, 0.2, 0.3], "by": "row"},
    {"density": [0.15, 0.9, 1.0], "gamma": [0.0, 0.2, 1.0], "by": "row", "precedence": "density", "rescale": True},
    {"density": [0.0, 0.0, 0.9], "gamma": [0.0, 0.2, 1.0], "by": "row"},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(breadcrumbs, reference, base, models, {"weight": WEIGHT, **parameters})


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    parameters = {"weight": WEIGHT, "density": [0.1, 0.5, 0.9], "gamma": [0.01, 0.02, 0.3]}
    assert_reaches_bars(breadcrumbs, reference, base, models, parameters)


def merged(entries, **parameters):
    entries = torch.tensor(entries)
    return merge_tensor(breadcrumbs, torch.zeros_like(entries), [entries], {"weight": 1, **parameters}).tolist()


TEN = [1.0, -2.0, 3.0, -4.0, 5.0, 6.0, -7.0, 8.0, 9.0, -10.0]


def test_by_hand():
    assert merged(TEN, density=0.4, gamma=0.2) == [0, 0, 0, 0, 5, 6, -7, 8, 0, 0]
    assert merged(TEN, density=0.8, gamma=0.2) == [*TEN[:8], 0, 0]
    assert merged(TEN, density=0.4, gamma=0) == [0] * 6 + TEN[6:]
    assert merged(TEN, density=0, gamma=0.2) == [0] * 10
    assert merged(TEN, density=1, gamma=1) == [0] * 10


def test_which_share_holds_where_both_cannot():
    assert merged(TEN, density=0.9, gamma=0.3) == [*TEN[:7], 0, 0, 0]
    assert merged(TEN, density=0.9, gamma=0.3, precedence="density") == [*TEN[:9], 0]
    assert merged(TEN, density=1, gamma=0.3) == [*TEN[:7], 0, 0, 0]
    assert merged(TEN, density=1, gamma=0.3, precedence="density") == TEN
    # both can
    for precedence in ("gamma", "density"):
        assert merged(TEN, density=0.7, gamma=0.3, precedence=precedence) == [*TEN[:7], 0, 0, 0]


def test_a_tensor_too_small_for_outliers_loses_none():
    assert merged(TEN) == TEN
    assert merged(TEN, density=0.5) == [0] * 5 + TEN[5:]


def test_entries_as_large_as_a_cut_are_all_kept():
    entries = [3.0, -3.0, 3.0, 2.0, 1.0, -1.0, 1.0, 0.5]
    assert merged(entries, density=0.5, gamma=0.125) == [3, -3, 3, 2, 1, -1, 1, 0]
    assert merged([1.0] * 8, density=0.25, gamma=0.5) == [1.0] * 8


@pytest.mark.parametrize("precedence", ["gamma", "density"])
def test_rows_are_cut_on_their_own(precedence):
    rows = torch.tensor([TEN, [x * 100 for x in TEN]])
    parameters = {"weight": 1, "density": 0.4, "gamma": 0.2, "by": "row", "precedence": precedence}
    found = merge_tensor(breadcrumbs, torch.zeros_like(rows), [rows], parameters)
    expected = [0, 0, 0, 0, 5, 6, -7, 8, 0, 0]
    assert found.tolist() == [expected, [x * 100 for x in expected]]


def test_nothing_removed_is_task_arithmetic_bit_by_bit():
    base, models = make_models((80, 125), 3)
    plain = merge_tensor(task_arithmetic, base, models, {"weight": WEIGHT})
    for parameters in ({"gamma": 0}, {"gamma": 0.3, "precedence": "density"}, {"gamma": 0, "by": "row"}):
        assert torch.equal(merge_tensor(breadcrumbs, base, models, {"weight": WEIGHT, **parameters}), plain)


def test_columns_may_change_places():
    base, models = make_models((80, 125), 3)
    order = torch.randperm(125, generator=torch.Generator().manual_seed(0))
    parameters = {"weight": WEIGHT, "density": 0.3, "gamma": 0.1}
    turned = merge_tensor(breadcrumbs, base[:, order], [model[:, order] for model in models], parameters)
    assert torch.equal(turned, merge_tensor(breadcrumbs, base, models, parameters)[:, order])


def test_passes_are_saved_where_nothing_is_cut():
    cut = breadcrumbs.statistics["cut"]
    full = {"by": "tensor", "precedence": "gamma", "density": (1.0, 1.0), "gamma": (0.0, 0.0)}
    assert not cut.wanted(full)
    assert cut.wanted({**full, "gamma": (0.0, 0.1)})
    assert not cut.wanted({**full, "gamma": (0.0, 0.1), "precedence": "density"})
    assert cut.wanted({**full, "density": (1.0, 0.9), "precedence": "density"})
    assert not cut.wanted({**full, "gamma": (0.0, 0.1), "by": "row"})
