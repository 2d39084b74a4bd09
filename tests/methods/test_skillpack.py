import pytest
import torch

from merganser.methods.skillpack import quantise, restore_vectors, skillpack
from tests.methods.bars import assert_reaches_bars, error, make_models
from tests.methods.sidecars import assert_bears_degenerate_inputs, restored, stored_bytes
from tests.methods.spectra import make_matrices
from tests.reference.skillpack import nearest_levels
from tests.reference.skillpack import skillpack as reference
from tests.reference.skillpack import skillpack_restored as reference_restored

SMALL = {"rank": 0.5, "ranks_16bit": 1, "ranks_8bit": 3, "ranks_4bit": 6, "group": 16}
WIDTHS = [16, 8, 8, 8, 4, 4, 4, 4, 4, 4, *[2] * 100]


@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.5, "weight": [1.0, 0.5, 2.0]}], ids=str)
def test_reaches_the_bars(parameters):
    base, models = make_models((80, 125), 3)
    assert_reaches_bars(skillpack, reference, base, models, parameters)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [1, 15, 16, 40])
def test_vectors_are_rounded_as_by_the_reference(bits, size):
    vectors = torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    vectors[1] = 0
    codes, steps = quantise(vectors, bits, 16)
    assert codes.min() >= 0
    assert codes.max() < 2**bits
    assert torch.equal(steps, steps.bfloat16().double())
    again = restore_vectors(codes, steps, bits, 16)
    for vector, one in zip(vectors, again, strict=True):
        torch.testing.assert_close(one, nearest_levels(vector, bits, 16), rtol=0, atol=1e-12)
    assert not again[1].any()


def test_more_bits_are_nearer():
    vectors = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        error(restore_vectors(*quantise(vectors, bits, 128), bits, 128), vectors.double()) for bits in (2, 4, 8, 16)
    ]
    # what the best levels leave of Gaussian numbers is 0.343 and 0.107
    assert 0.34 < errors[0] < 0.36
    assert 0.10 < errors[1] < 0.13
    assert errors[2] < 0.01
    assert errors[3] < 1e-4


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
@pytest.mark.parametrize("origin", ["base", "merged"])
def test_restores_as_the_reference(shape, origin):
    base, models = make_matrices(shape, 3, "random")
    merged, found = restored(skillpack, base, models, {**SMALL, "origin": origin})
    start = base if origin == "base" else merged
    expected = reference_restored(start, models, rank=20, widths=WIDTHS, group=16)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_float32_loses_nothing_more():
    base, models = make_matrices((200, 150), 3, "random")
    wide = restored(skillpack, base, models, SMALL)[1]
    narrow = restored(skillpack, base.float(), [model.float() for model in models], SMALL)[1]
    for one, other, model in zip(narrow, wide, models, strict=True):
        assert error(one - base, model - base) == pytest.approx(error(other - base, model - base), rel=1e-3)


def test_all_ranks_at_16_bits_give_the_models_back():
    base, models = make_matrices((40, 64), 3, "random")
    for again, model in zip(
        restored(skillpack, base, models, {"rank": 1.0, "ranks_16bit": 40})[1], models, strict=True
    ):
        assert error(again - base, model - base) < 5e-5


def test_more_bits_cost_more_and_lose_less():
    base, models = make_matrices((96, 96), 3, "shared")
    settings = [
        {"rank": 0.25, "ranks_8bit": 0, "ranks_4bit": 0},
        {"rank": 0.25, "ranks_8bit": 0, "ranks_4bit": 12},
        {"rank": 0.25, "ranks_8bit": 6, "ranks_4bit": 12},
        {"rank": 0.25, "ranks_8bit": 24},
        {"rank": 0.5, "ranks_8bit": 48},
        {"rank": 1.0, "ranks_16bit": 96},
    ]
    sizes = [stored_bytes(skillpack, base, models, given)[0] for given in settings]
    errors = [error(restored(skillpack, base, models, given)[1][0] - base, models[0] - base) for given in settings]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_a_task_costs_what_its_bits_say():
    base, models = make_models((80, 125), 3)
    size, shared = stored_bytes(skillpack, base, models, SMALL)
    codes = sum(
        -(-count * side * bits // 8) for bits, count in ((16, 1), (8, 3), (4, 6), (2, 30)) for side in (80, 125)
    )
    assert (size, shared) == (codes + 40 * (5 + 8) * 2 + 40 * 4, 0)


def test_bears_degenerate_inputs():
    assert_bears_degenerate_inputs(skillpack)
    assert_bears_degenerate_inputs(skillpack, {"rank": 1.0, "ranks_8bit": 2, "ranks_4bit": 2, "origin": "merged"})
