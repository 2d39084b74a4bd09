"""CAT Merging against its reference, and what follows from its definition."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.cat import cat
from tests.methods.inputs import make_grams
from tests.methods.spectra import SHAPES, make_matrices
from tests.reference.cat import cat as reference

SETTINGS = [
    {},
    {"order": "smallest"},
    {"trade_off": 0.0, "rank": 1},
    {"rank": 10_000, "rescale": False},
    {"trade_off": 3.0, "rank": 3, "rescale": False},
]


def merged(base, models, data, **parameters):
    return merge_tensor(cat, base, models, parameters, data={"gram": data})


def total(base, models):
    return base + sum(model - base for model in models)


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["random", "shared"])
def test_agrees_with_the_reference(parameters, kind):
    for shape in SHAPES:
        base, models = make_matrices(shape, 3, kind)
        data = make_grams(shape[1], 3)
        expected = reference(base, models, data, **parameters)
        found = merged(base, models, data, **parameters)
        assert (found - expected).norm() <= 1e-7 * (expected - base).norm()
    torch.testing.assert_close(
        merged(base, models, data, **parameters, **{"lambda": 0.25}),
        base + 0.25 * (found - base),
        rtol=1e-9,
        atol=1e-12,
    )


def axes():
    """Two task vectors with outputs along the axes, and inputs on which they act by known amounts."""
    base = torch.zeros(3, 2)
    first, second = torch.zeros(3, 2), torch.zeros(3, 2)
    first[:, 0] = torch.tensor([1.0, 2.0, 0.0])
    second[:, 1] = torch.tensor([0.0, 0.0, 4.0])
    second[0, 0] = 3.0
    return base, [first, second], [torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]


def test_by_hand():
    base, models, data = axes()
    # on inputs of task 1 the second acts through its entry 3 alone; it does not need that on its own inputs.
    # The first does nothing on inputs of task 2: there is nothing to remove from it.
    expected = total(base, models)
    expected[0, 0] -= 3.0
    torch.testing.assert_close(merged(base, models, data, rescale=False), expected)
    kept = models[1].clone()
    kept[0, 0] = 0
    kept *= models[1].norm() / kept.norm()
    torch.testing.assert_close(merged(base, models, data), models[0] + kept)
    # the smallest eigenvalue is that of the output which the second needs: -16
    other = total(base, models)
    other[2, 1] -= 4.0
    torch.testing.assert_close(merged(base, models, data, rescale=False, rank=1, order="smallest"), other)


def test_the_trade_off_spares_what_a_task_needs_itself():
    base, models, data = axes()
    data[1] = torch.eye(2)
    # the first disturbs task 2 as much as it acts on its own inputs, and so does the second through its entry 3
    spared = merged(base, models, data, rescale=False, trade_off=1.01)
    torch.testing.assert_close(spared[:, 1], models[1][:, 1])
    assert spared[0, 0] == 4.0
    removed = merged(base, models, data, rescale=False, trade_off=0.99)
    torch.testing.assert_close(removed, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 4.0]]))


def test_models_without_conflict_are_added():
    base, models = make_matrices((24, 40), 2, "random")
    data = make_grams(40, 2)
    for own, gram, hidden in zip(models, data, (slice(0, 20), slice(20, 40)), strict=True):
        own[:, hidden] = base[:, hidden]
        gram[hidden] = 0
        gram[:, hidden] = 0
    torch.testing.assert_close(merged(base, models, data), total(base, models), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged(base, models[:1], data[:1]), models[0], rtol=1e-9, atol=1e-12)
    without = merge_tensor(cat, base, models, {"lambda": 0.5})
    torch.testing.assert_close(without, base + 0.5 * (total(base, models) - base), rtol=1e-9, atol=1e-12)


def test_less_disturbs_a_task_than_before():
    base, models = make_matrices((24, 40), 2, "random")
    data = make_grams(40, 2)

    def disturbance(step):
        return float((step @ data[0] @ step.T).trace())

    before = disturbance(models[1] - base)
    seen = [before]
    for rank in (1, 4, 12):
        # without inputs of task 2 nothing is removed from the first
        found = merged(base, models, [data[0], torch.zeros(40, 40).double()], rank=rank, rescale=False)
        seen.append(disturbance(found - models[0]))
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.5 * before
    smallest = merged(base, models, [data[0], torch.zeros(40, 40).double()], rank=4, rescale=False, order="smallest")
    assert disturbance(smallest - models[0]) > seen[2]


def test_what_is_removed_whole_is_not_blown_up():
    base, models = make_matrices((8, 40), 2, "random")
    data = make_grams(40, 2)
    found = merged(base, models, data, trade_off=0.0, rank=8)
    torch.testing.assert_close(found, base, rtol=1e-9, atol=1e-12)


def test_another_basis_of_outputs_gives_the_same_map():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    turned = merged(turn @ base, [turn @ model for model in models], data)
    torch.testing.assert_close(turn.T @ turned, merged(base, models, data), rtol=1e-7, atol=1e-9)
