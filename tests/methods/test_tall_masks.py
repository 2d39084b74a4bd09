import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.consensus import consensus
from merganser.methods.tall_masks import tall_masks
from tests.methods.bars import assert_reaches_bars, error, make_models
from tests.methods.sidecars import assert_bears_degenerate_inputs, assert_restores, restored, stored_bytes
from tests.reference.tall_masks import tall_masks as reference
from tests.reference.tall_masks import tall_masks_restored as reference_restored


@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.3}], ids=str)
@pytest.mark.parametrize("n", [1, 3, 16])
def test_reaches_the_bars(parameters, n):
    base, models = make_models((80, 125), n)
    assert_reaches_bars(tall_masks, reference, base, models, parameters)


@pytest.mark.parametrize(
    "parameters", [{}, {"lambda": 0.5}, {"mask_lambda": 0.2}, {"mask_lambda": [0.2, 0.4, 0.6]}], ids=str
)
def test_restores_as_the_reference(parameters):
    base, models = make_models((80, 125), 3)
    assert_restores(tall_masks, reference_restored, base, models, parameters)


def test_restores_by_hand():
    base = torch.full((5,), 10.0)
    models = [base + torch.tensor([4.0, -1.0, 3.0, 0.0, 2.0]), base + torch.tensor([2.0, 3.0, -1.0, 0.0, -5.0])]
    merged, found = restored(tall_masks, base, models)
    assert merged.tolist() == [16, 12, 12, 10, 7]
    # 4 > 0.4 * 2, 1 < 0.4 * 3, 3 > 0.4 * 1, 0 = 0, and 2 = 0.4 * 5, up to what 0.4 is in float64
    assert found[0].tolist() == [16, 10, 12, 10, 10]
    assert found[1].tolist() == [16, 12, 10, 10, 7]


def test_one_model_comes_back():
    base, (model,) = make_models((80, 125), 1)
    torch.testing.assert_close(restored(tall_masks, base, [model])[1][0], model, rtol=0, atol=1e-8)
    low = base.bfloat16(), model.bfloat16()
    assert torch.equal(restored(tall_masks, low[0], [low[1]])[1][0], low[1])


def test_no_threshold_keeps_all_that_changed():
    base, models = make_models((80, 125), 3)
    models[0][:40] = base[:40]
    merged, found = restored(tall_masks, base, models, {"mask_lambda": 0.0})
    assert torch.equal(found[0][:40], base[:40])
    torch.testing.assert_close(found[0][40:], merged[40:], rtol=0, atol=1e-8)
    # all the others' changes weigh more than nothing
    assert torch.equal(restored(tall_masks, base, models, {"mask_lambda": 1e30})[1][1], base)


def test_of_two_tasks_the_masks_compare_their_changes():
    base = torch.zeros(80, 125)
    models = make_models((80, 125), 2, change=1.0)[1]
    merged, found = restored(tall_masks, base, models, {"mask_lambda": 0.6})
    first = models[0].abs() > 0.6 * models[1].abs()
    assert (torch.equal(found[0] != 0, first), torch.equal(found[0], torch.where(first, merged, 0))) == (True, True)


def test_scaling_the_task_vectors_scales_what_is_restored():
    base = torch.zeros(80, 125)
    vectors = make_models((80, 125), 3)[1]
    once = restored(tall_masks, base, vectors)[1]
    tiny = restored(tall_masks, base, [vector * 2.0**-40 for vector in vectors])[1]
    assert all(torch.equal(a * 2.0**40, b) for a, b in zip(tiny, once, strict=True))


def test_the_merged_model_is_consensus_without_a_quorum():
    base, models = make_models((80, 125), 3)
    for lambda_ in (1.0, 0.3):
        merged = merge_tensor(tall_masks, base, models, {"lambda": lambda_})
        other = merge_tensor(consensus, base, models, {"k": 0, "lambda": lambda_})
        torch.testing.assert_close(merged, other, rtol=0, atol=2e-8)


def test_less_lambda_costs_digits_in_16_bits_alone():
    base, models = make_models((80, 125), 3)
    wide = [restored(tall_masks, base, models, {"lambda": value})[1][0] for value in (1.0, 0.3)]
    assert error(wide[1], wide[0].double()) < 1e-6
    low = base.bfloat16(), [model.bfloat16() for model in models]
    near, far = (error(restored(tall_masks, *low, {"lambda": value})[1][0], wide[0].double()) for value in (1.0, 0.3))
    assert near < far < 0.02


def test_a_task_costs_a_bit_per_element():
    base, models = make_models((80, 125), 3)
    assert stored_bytes(tall_masks, base, models) == (80 * 125 / 8, 0)


def test_bears_degenerate_inputs():
    assert_bears_degenerate_inputs(tall_masks)
    assert_bears_degenerate_inputs(tall_masks, {"lambda": 0.3})
