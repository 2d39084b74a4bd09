"""RegMean against its reference, and what follows from its definition."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.regmean import regmean
from merganser.methods.task_arithmetic import task_arithmetic
from tests.methods.inputs import loss, make_grams
from tests.methods.spectra import KINDS, SHAPES, make_matrices
from tests.reference.regmean import regmean as reference

SETTINGS = [
    {},
    {"alpha": 1.0, "ridge": 1e-6},
    {"alpha": 0.1, "reference": "base", "ridge": 0.1},
    {"weight": [1.0, 0.25, 3.0]},
    {"alpha": 1.0, "limit": 0.6},
]


def merged(base, models, data, **parameters):
    return merge_tensor(regmean, base, models, parameters, data={"gram": data})


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(parameters, kind):
    for shape in SHAPES:
        base, models = make_matrices(shape, 3, kind)
        data = make_grams(shape[1], 3)
        expected = reference(base, models, data, **parameters)
        step = (expected - base).norm()
        found = merged(base, models, data, **parameters)
        assert (found - expected).norm() <= 1e-9 * step
        single = merged(
            base.float(), [model.float() for model in models], [gram.float() for gram in data], **parameters
        )
        wide = merged(base.float().double(), [model.float().double() for model in models], data, **parameters)
        # one rounding of the result, and those of the Gram matrices
        assert (single - wide).norm() <= 2e-7 * wide.norm() + 1e-4 * step


def test_by_hand():
    base, models = torch.zeros(1, 2), [torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, 0.0]])]
    data = [torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([1.0, 2.0]))]
    # a column belongs to a model as far as that model's inputs are large there
    found = merged(base, models, data, ridge=1e-9)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.0]]), rtol=1e-6, atol=1e-6)


def test_equal_grams_give_the_average_and_one_model_itself():
    base, models = make_matrices((24, 40), 3, "random")
    same = make_grams(40, 1) * 3
    average = merge_tensor(task_arithmetic, base, models, {"weight": 1.0, "normalize": True})
    torch.testing.assert_close(merged(base, models, same), average, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged(base, models[:1], same[:1]), models[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged(base, [models[0]] * 3, make_grams(40, 3)), models[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        merged(base, models[:1], same[:1], reference="base", ridge=1e-12), models[0], rtol=1e-8, atol=1e-12
    )


def test_alpha_0_averages_columns_by_themselves():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    shares = torch.stack([gram.diagonal() for gram in data])
    expected = sum(model * share / shares.sum(0) for model, share in zip(models, shares, strict=True))
    torch.testing.assert_close(merged(base, models, data, alpha=0.0, ridge=1e-12), expected, rtol=1e-8, atol=1e-11)


def test_nothing_fits_better():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    best = merged(base, models, data, alpha=1.0, ridge=1e-12)
    least = loss(best, models, data)
    generator = torch.Generator().manual_seed(0)
    noise = [1e-4 * torch.randn(24, 40, generator=generator, dtype=torch.float64) for _ in range(5)]
    average = merge_tensor(task_arithmetic, base, models, {"weight": 1.0, "normalize": True})
    for other in (average, base, *models, *(best + own for own in noise)):
        assert least < loss(other, models, data)


def test_sizes_of_grams_count_only_against_each_other():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    assert torch.equal(merged(base, models, [gram * 2.0**-40 for gram in data]), merged(base, models, data))
    twice = [data[0] * 2, *data[1:]]
    weighted = merged(base, models, data, weight=[2.0, 1.0, 1.0], reference="base")
    assert torch.equal(weighted, merged(base, models, twice, reference="base"))
    assert not torch.allclose(merged(base, models, twice), merged(base, models, data), rtol=0, atol=1e-6)


def test_another_basis_of_inputs_gives_the_same_map():
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    turn = torch.randn(40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    back = torch.linalg.inv(turn)
    # inputs x become turn x
    turned = merged(
        base @ back, [model @ back for model in models], [turn @ gram @ turn.T for gram in data], alpha=1.0, ridge=1e-13
    )
    plain = merged(base, models, data, alpha=1.0, ridge=1e-13)
    torch.testing.assert_close(turned @ turn, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reference", ["average", "base"])
def test_directions_without_input_keep_the_reference(reference):
    base, models = make_matrices((24, 40), 3, "random")
    data = make_grams(40, 3)
    for gram in data:
        gram[30:] = 0
        gram[:, 30:] = 0
    start = (
        merge_tensor(task_arithmetic, base, models, {"weight": 1.0, "normalize": True})
        if reference == "average"
        else base
    )
    found = merged(base, models, data, reference=reference, alpha=1.0)
    torch.testing.assert_close(found[:, 30:], start[:, 30:], rtol=1e-9, atol=1e-12)
    assert (found[:, :30] - start[:, :30]).abs().min() > 0


def test_who_received_no_token_has_no_say():
    base, models = make_matrices((24, 40), 3, "random")
    first, second, _ = make_grams(40, 3)
    zero = torch.zeros_like(first)
    found = merged(base, models, [first, second, zero], reference="base")
    torch.testing.assert_close(
        found, merged(base, models[:2], [first, second], reference="base"), rtol=1e-9, atol=1e-12
    )
    average = merge_tensor(task_arithmetic, base, models, {"weight": 1.0, "normalize": True})
    torch.testing.assert_close(merged(base, models, [zero] * 3), average, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged(base, models, [zero] * 3, reference="base"), base)


def test_a_few_huge_inputs_do_not_move_it_far():
    """Each model has one token as large as all others together a thousand times, nearly the same in all models."""
    base, models = make_matrices((24, 40), 3, "random")
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(40, generator=generator, dtype=torch.float64)
    data = []
    for gram in make_grams(40, 3):
        spike = 1e3 * (common + 0.1 * torch.randn(40, generator=generator, dtype=torch.float64))
        data.append(gram + torch.outer(spike, spike))
    longest = max((model - base).norm() for model in models)
    free = merged(base, models, data, limit=1e9)
    assert (free - base).norm() > 3 * longest
    for limit in (1.0, 2.0):
        found = merged(base, models, data, limit=limit)
        assert (found - base).norm() <= limit * longest
        average = merge_tensor(task_arithmetic, base, models, {"weight": 1.0, "normalize": True})
        assert not torch.allclose(found, average, rtol=0, atol=1e-4)
    # a limit that is kept anyway changes nothing
    assert torch.equal(free, merged(base, models, data, limit=float((free - base).norm() / longest) * 1.01))


def test_fewer_tokens_than_inputs_are_borne():
    """The sum is singular, and in float32 not even positive semidefinite."""
    base, models = make_matrices((24, 96), 3, "random")
    data = [gram.float() for gram in make_grams(96, 3, tokens=4)]
    found = merged(base, models, data, alpha=1.0, ridge=1e-12)
    assert torch.isfinite(found).all()
    # as the steps of the models are, and no multiple
    assert (found - base).norm() < 3 * max((model - base).norm() for model in models)


def test_without_statistics_matrices_are_averaged():
    base, models = make_matrices((24, 40), 3, "random")
    weight = [1.0, 2.0, 5.0]
    expected = sum(w * model for w, model in zip(weight, models, strict=True)) / 8
    torch.testing.assert_close(merge_tensor(regmean, base, models, {"weight": weight}), expected, rtol=1e-9, atol=1e-12)
