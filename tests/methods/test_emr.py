import pytest
import torch

from merganser import merge, restore
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.emr import emr
from tests.making import make_recipe, read_model, write_model
from tests.methods.bars import assert_reaches_bars, error, make_models
from tests.methods.sidecars import assert_bears_degenerate_inputs, assert_restores, restored
from tests.reference.emr import emr as reference
from tests.reference.emr import emr_factors
from tests.reference.emr import emr_restored as reference_restored


@pytest.mark.parametrize("n", [1, 2, 3, 16])
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(n, change):
    base, models = make_models((80, 125), n, change=change)
    assert_reaches_bars(emr, reference, base, models)


def test_reaches_the_bars_on_a_million_elements():
    base, models = make_models((1000, 1000), 3)
    assert_reaches_bars(emr, reference, base, models)


def test_by_hand():
    base = torch.full((5,), 10.0)
    # the sum is 3, -1, 0, 0 and 0: ties elect minus, and where nothing is below 0, nothing is elected
    first = base + torch.tensor([1.0, 2.0, 1.0, 0.0, -1.0])
    second = base + torch.tensor([4.0, -1.5, -2.0, 0.0, 1.0])
    third = base + torch.tensor([-2.0, -1.5, 1.0, 0.0, 0.0])
    assert merge_tensor(emr, base, [first, second, third]).tolist() == [14, 8.5, 8, 10, 9]


def test_rounding_does_not_elect():
    # in float32 the first two add up to the first, and the sum to 0
    models = [torch.tensor([1.0]), torch.tensor([2.0**-30]), torch.tensor([-1.0])]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert merge_tensor(emr, torch.zeros(1), [models[i] for i in order]).item() == 1


def test_one_model_and_equal_models_are_that_model():
    base, (model,) = make_models((80, 125), 1)
    for n in (1, 2, 5):
        torch.testing.assert_close(merge_tensor(emr, base, [model] * n), model, rtol=0, atol=1e-8)


def test_no_element_moves_against_its_vote():
    base, models = make_models((80, 125), 4)
    vectors = torch.stack([model - base for model in models])
    moved = merge_tensor(emr, torch.zeros_like(base), list(vectors))
    assert (moved * vectors.sum(dim=0) >= 0).all()
    assert torch.equal(moved.abs(), (vectors * moved.sign()).amax(dim=0))


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_restores_as_the_reference(n):
    base, models = make_models((80, 125), n)
    assert_restores(emr, reference_restored, base, models)
    assert_restores(emr, reference_restored, base, models, {"rescale_over": "tensor", "rescale_by": "mean"})


def test_restores_by_hand():
    base = torch.full((4,), 10.0)
    models = [base + torch.tensor([4.0, -1.0, 3.0, 0.0]), base + torch.tensor([2.0, -2.0, -1.0, 0.0])]
    merged, found = restored(emr, base, models)
    assert merged.tolist() == [14, 8, 13, 10]
    # 8 of the 9 under the first mask, 5 of the 6 under the second
    assert found[0].tolist() == pytest.approx([10 + 8 / 9 * 4, 10 - 8 / 9 * 2, 10 + 8 / 9 * 3, 10])
    assert found[1].tolist() == pytest.approx([10 + 5 / 6 * 4, 10 - 5 / 6 * 2, 10, 10])


@pytest.mark.parametrize("rescale_by", ["sum", "mean"])
def test_one_factor_for_the_model(tmp_path, rescale_by):
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (40, 30), "small": (10,), "middle": (9, 7)}
    states = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(4)]
    # so that the ways to add up differ
    states[1]["small"] *= 20
    paths = [write_model(tmp_path / f"m{i}", state) for i, state in enumerate(states)]
    out = merge(make_recipe("emr", paths[1:], paths[0], {"rescale_by": rescale_by}), tmp_path / "out").out
    merged = read_model(out)
    models = [[state[name] for state in states[1:]] for name in shapes]
    factors = emr_factors([states[0][name] for name in shapes], models, [merged[name] for name in shapes], rescale_by)
    for i, factor in enumerate(factors):
        found = read_model(restore(out, f"m{i + 1}").out)
        for name in shapes:
            start, unified = states[0][name].double(), merged[name].double() - states[0][name].double()
            mask = (states[i + 1][name].double() - start) * unified > 0
            assert error(found[name], start + factor * mask * unified) < 1e-6


def test_restoring_gives_one_model_and_equal_models_back():
    base, (model,) = make_models((80, 125), 1)
    for n in (1, 2, 5):
        for again in restored(emr, base, [model] * n)[1]:
            torch.testing.assert_close(again, model, rtol=0, atol=1e-8)
        low = [base.bfloat16(), model.bfloat16()]
        assert torch.equal(restored(emr, low[0], low[1:] * n)[1][0], low[1])


def test_what_is_restored_never_opposes_the_model():
    base, models = make_models((80, 125), 4, change=1.0)
    zero = torch.zeros_like(base)
    vectors = [model - base for model in models]
    for vector, again in zip(vectors, restored(emr, zero, vectors)[1], strict=True):
        assert (vector * again >= 0).all()
        assert again.abs().sum().item() == pytest.approx(vector.abs().sum().item(), rel=1e-5)


def test_bears_degenerate_inputs():
    assert_bears_degenerate_inputs(emr)
