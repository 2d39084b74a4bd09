"""The task vector family against mergekit 0.1.5 in float64, with the parameter values that reproduce it."""

import pytest

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.method.registry import get_method
from tests.methods.bars import FLOAT32, error, make_models

WEIGHT = [0.5, 0.3, 0.4]
SHARES = {"weight": WEIGHT, "density": [0.1, 0.5, 0.9]}
CASES = [
    ("task_arithmetic", {"weight": WEIGHT, "lambda": 0.7}),
    ("task_arithmetic", {"weight": WEIGHT, "normalize": True}),
    ("ties", SHARES),
    ("ties", {**SHARES, "normalize": False, "rescale": True}),
    ("ties", {"weight": [0.5, -0.3, 0.4], "density": [0.0, 0.5, 0.00001]}),
    # what is drawn differs, what follows from a full density does not
    ("dare_linear", {"weight": WEIGHT}),
    ("dare_ties", {"weight": WEIGHT}),
    ("della", {"weight": WEIGHT}),
    ("della_linear", {"weight": WEIGHT}),
    ("breadcrumbs", {"weight": WEIGHT}),
    ("breadcrumbs", {**SHARES, "gamma": [0.01, 0.2, 0.3]}),
    ("breadcrumbs", {**SHARES, "gamma": [0.01, 0.02, 0.3], "rescale": True, "normalize": True}),
    ("breadcrumbs_ties", {**SHARES, "gamma": [0.01, 0.2, 0.3]}),
    ("sce", {}),
    ("sce", {"select_topk": 0.5}),
    ("sce", {"select_topk": 0.1}),
    ("sce", {"select_topk": 0.0}),
    ("ram", {}),
    ("ram", {"epsilon": 1e-3}),
    ("ramplus_tl", {"epsilon": 1e-3}),
    ("ramplus_tl", {"epsilon": 1e-3, "r": 0.5, "alpha": 3.0}),
]


@pytest.mark.peer
@pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_agrees_with_mergekit(name, parameters, change):
    mergekit = pytest.importorskip("mergekit.merge_methods")
    base, models = make_models((80, 125), 3, change=change)
    method = get_method(name)
    ours = merge_tensor(method, base, models, {**parameters, **method.mergekit})
    wide = [tensor.double() for tensor in (base, *models)]
    theirs = mergekit.merge_tensor(wide, name, parameters=parameters, base_index=0)
    assert error(ours, theirs) <= FLOAT32
