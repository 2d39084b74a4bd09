import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.doge import RowLoss, doge, shared_directions
from tests.methods.spectra import BARS, KINDS, SHAPES, make_matrices, step_error, steps
from tests.methods.whole_model import merge_whole_model
from tests.reference.doge import directions, loss
from tests.reference.doge import doge as reference

SETTINGS = [
    {},
    {"solver": "rows"},
    {"solver": "rows", "density": 1.0, "eta": 0.5},
    {"steps": 60, "density": 1.0, "subspace": 2},
    {"steps": 60, "density": 0.0},
]


def test_is_refused_for_one_model():
    base, models = make_matrices((20, 30), 1, "random")
    with pytest.raises(ValueError, match="doge takes 2 or more models and a base"):
        merge_tensor(doge, base, models)


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 5])
def test_reaches_the_bar(parameters, kind, n):
    # a wide and a tall matrix are enough for many models
    for shape in SHAPES if n == 2 else SHAPES[:2]:
        base, models = make_matrices(shape, n, kind)
        if parameters.get("density") == 0:
            assert torch.equal(merge_tensor(doge, base, models, parameters), base)
        else:
            error = step_error(doge, reference, base, models, parameters)
            assert error <= BARS[kind], (shape, error)


def test_the_gradient_is_that_of_the_loss():
    base, models = make_matrices((12, 20), 3, "random", size=0.1)
    deltas = [model - base for model in models]
    factors = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    change = torch.randn(12, 20, dtype=torch.float64).requires_grad_()
    loss(deltas, factors, change).backward()
    torch.testing.assert_close(RowLoss(deltas, factors).gradient(change.detach()), change.grad)


@pytest.mark.parametrize("n", [2, 4])
def test_rows_leave_no_loss_where_none_must_be(n):
    base, models = make_matrices((12, 20), n, "random")
    deltas = [model - base for model in models]
    factors = torch.linspace(0.1, 0.4, n, dtype=torch.float64)
    least = RowLoss(deltas, factors).least_change()
    before, after = (float(loss(deltas, factors, change)) for change in (torch.zeros_like(base), least))
    assert after <= 1e-18 * before
    # the smallest such change lies in the rows of the task vectors
    for row in range(12):
        rows = torch.stack([delta[row] for delta in deltas])
        inside = torch.linalg.lstsq(rows.T, least[row]).solution @ rows
        torch.testing.assert_close(inside, least[row])
    # the merge is then like every task vector, row by row
    merged = sum(f * (delta + least) for f, delta in zip(factors, deltas, strict=True))
    for delta in deltas:
        torch.testing.assert_close((delta * merged).sum(1), (delta * delta).sum(1))


def test_equal_and_unchanged_models():
    base, (model, other) = make_matrices((18, 30), 2, "random")
    for solver in ("adam", "rows"):
        assert torch.equal(merge_tensor(doge, base, [base, base], {"solver": solver}), base)
        for models in ([model] * 3, [model, base], [base, other, base], [model, 2 * base - model]):
            found = merge_tensor(doge, base, models, {"solver": solver})
            assert torch.isfinite(found).all()
    # equal models: every row becomes theirs
    found = steps(doge, base, [model] * 3, {"solver": "rows", "density": 1.0})
    torch.testing.assert_close(found, model - base, rtol=1e-6, atol=1e-10)
    # who did not change has no say in it
    alone = steps(doge, base, [other, model], {"solver": "rows", "density": 1.0})
    torch.testing.assert_close(steps(doge, base, [other, base, model], {"solver": "rows", "density": 1.0}), alone)


def test_the_shared_directions_are_left_alone():
    base, models = make_matrices((18, 30), 3, "random")
    shared = shared_directions([model - base for model in models], 3)
    expected = directions([model - base for model in models], 6)
    assert shared.shape == (18, 3)
    torch.testing.assert_close(shared @ shared.T, expected @ expected.T)
    # with one step of Adam the change has the signs of the projected gradient
    deltas = [model - base for model in models]
    factors = torch.stack([0.07 / delta.norm() for delta in deltas])
    slope = RowLoss(deltas, factors).gradient(torch.zeros_like(base))
    slope -= shared @ shared.T @ slope
    found = steps(doge, base, models, {"density": 1.0, "steps": 1, "learning_rate": 1e-5})
    plain = sum(f * delta for f, delta in zip(factors, deltas, strict=True))
    change = (found - plain) / factors.sum()
    assert ((change < 0) == (slope > 0)).float().mean() > 0.99


def test_the_cut_is_that_of_the_whole_model():
    shapes = [(16, 24), (24, 12)]
    tensors = [make_matrices(shape, 3, "random", seed=i, size=10.0**-i) for i, shape in enumerate(shapes, 1)]
    tensors = [(base.float(), [model.float() for model in models]) for base, models in tensors]
    parameters = {"density": 0.4, "solver": "rows"}
    found = merge_whole_model(doge, tensors, parameters)
    kept = [int((merged != base).sum()) for merged, (base, _) in zip(found, tensors, strict=True)]
    # hardly anything of the second reaches the cut
    assert kept[0] > 300
    assert kept[1] < 30
    sizes = torch.cat([(model - base).abs().flatten() for base, models in tensors for model in models[:1]])
    cut = sizes.sort(descending=True).values[int(0.4 * len(sizes)) - 1]
    base, models = tensors[0]
    untouched = torch.stack([(model - base).abs() < cut * 0.9 for model in models]).all(dim=0)
    assert torch.equal(found[0][untouched], base[untouched])


def test_many_models_and_packed_experts():
    base, models = make_matrices((9, 14), 16, "random")
    assert step_error(doge, reference, base, models, {"solver": "rows"}) <= 1e-3
    assert torch.isfinite(merge_tensor(doge, base, models)).all()
    stacked, pack = torch.stack([base, base]), [torch.stack([model, base]) for model in models[:2]]
    merged = merge_tensor(doge, stacked, pack, {"density": 1.0}, role="expert")
    assert torch.equal(merged[0], merge_tensor(doge, base, models[:2], {"density": 1.0}))
    assert torch.equal(merged[1], base)
