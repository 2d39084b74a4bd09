import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.metagpt import metagpt
from merganser.methods.sce import sce
from merganser.methods.varm import varm
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.varm import varm as reference

SETTINGS = [{"variation": variation, "by": by} for variation in ("square", "abs") for by in ("tensor", "element")]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    models = [base + (i + 1) * (model - base) for i, model in enumerate(models)]
    assert_reaches_bars(varm, reference, base, models, parameters)


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bars_with_other_numbers_of_models(n, parameters):
    base, models = make_models((80, 125), n)
    assert_reaches_bars(varm, reference, base, models, parameters)


def test_by_hand():
    base = torch.ones(2)
    models = [torch.tensor([4.0, 1.0]), torch.tensor([2.0, -1.0])]

    def merged(**given):
        return merge_tensor(varm, base, models, given).tolist()

    # squares 9 and 5, absolute values 3 and 3
    assert merged() == pytest.approx([1 + (27 + 5) / 14, 1 - 10 / 14])
    assert merged(variation="abs") == pytest.approx([3, 0])
    assert merged(by="element") == pytest.approx([1 + (27 + 1) / 10, -1])
    assert merged(by="element", variation="abs") == pytest.approx([1 + 10 / 4, -1])


def test_it_is_sce_that_selects_all_where_no_signs_conflict():
    base, models = make_models((80, 125), 3)
    same = [base + (model - base).abs() * base.sign() for model in models]
    expected = merge_tensor(sce, base, same, {"select_topk": 1})
    torch.testing.assert_close(merge_tensor(varm, base, same), expected, rtol=0, atol=1e-8)
    # and not where they do: sce erases
    assert not torch.allclose(merge_tensor(varm, base, models), merge_tensor(sce, base, models), rtol=0, atol=1e-5)


def test_squares_of_a_tensor_are_metagpt_inside_it():
    base, models = make_models((80, 125), 3)
    expected = merge_tensor(metagpt, base, models, {"norms_over": "tensor"})
    assert torch.equal(merge_tensor(varm, base, models), expected)


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_who_alone_changed_a_tensor_gives_it(parameters):
    base, (model,) = make_models((80, 125), 1)
    found = merge_tensor(varm, base, [base, model, base], parameters)
    torch.testing.assert_close(found, model, rtol=0, atol=1e-8)
    assert torch.equal(merge_tensor(varm, base, [base] * 3, parameters), base)


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_scaling_the_task_vectors_scales_the_merge(parameters):
    base, models = make_models((80, 125), 3)
    zero, vectors = torch.zeros_like(base), [model - base for model in models]
    once = merge_tensor(varm, zero, vectors, parameters)
    tiny = merge_tensor(varm, zero, [vector * 2.0**-80 for vector in vectors], parameters)
    assert torch.equal(tiny * 2.0**80, once)
