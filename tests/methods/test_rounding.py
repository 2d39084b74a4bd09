"""Experts of low rank on weights of real size: spectral methods must not take rounding of the weights for knowledge."""

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.method import methods

SPECTRAL = [method for method in methods().values() if method.family == "spectral"]
SHAPE = (144, 112)
RANKS = (4, 8, 16)


def make_experts(ranks=RANKS, shape=SHAPE, size=0.02, seed=0):
    """Return a base and the changes of experts, float64; `size` is the root mean square of these over the base's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    # rows and columns of real weights differ in size
    base = 0.04 * draw(*shape) * (0.4 * draw(shape[0], 1)).exp() * (0.4 * draw(1, shape[1])).exp()
    changes = []
    for rank in ranks:
        change = draw(shape[0], rank) @ draw(rank, shape[1])
        changes.append(change * size * base.square().mean().sqrt() / change.square().mean().sqrt())
    return base, changes


def stored_experts(dtype, *, base_rounded):
    """Return the base and the experts as they are stored, and the base and the changes as they were, float64."""
    base, changes = make_experts()
    start = base if base_rounded else base.to(dtype).double()
    return start.to(dtype), [(start + change).to(dtype) for change in changes], start, changes


def step(method, base, models):
    """Return what a merge at the defaults adds to the base, float64."""
    return merge_tensor(method, base, models, dtype=torch.float64, compute=torch.float32) - base.double()


def exact(method, base, vectors):
    """Return what a merge without rounding adds to the base: everything is float64."""
    models = [base + vector for vector in vectors]
    return merge_tensor(method, base, models, dtype=torch.float64, compute=torch.float64) - base


def cut_by_hand(base, models):
    found = []
    for model, rank in zip(models, RANKS, strict=True):
        u, s, vh = torch.linalg.svd(model.double() - base.double(), full_matrices=False)
        found.append(u[:, :rank] * s[:rank] @ vh[:rank])
    return found


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("base_rounded", [False, True], ids=["exact base", "rounded base"])
@pytest.mark.parametrize("method", SPECTRAL, ids=lambda method: method.name)
def test_float32_experts_merge_as_their_exact_factors(method, base_rounded):
    base, models, start, changes = stored_experts(torch.float32, base_rounded=base_rounded)
    assert error(step(method, base, models), exact(method, start, changes)) < 0.05


@pytest.mark.parametrize("method", SPECTRAL, ids=lambda method: method.name)
def test_bfloat16_experts_merge_as_if_the_noise_was_cut_by_hand(method):
    base, models, start, changes = stored_experts(torch.bfloat16, base_rounded=False)
    expected = exact(method, start, changes)
    by_hand = error(exact(method, start, cut_by_hand(base, models)), expected)
    assert error(step(method, base, models), expected) < 1.02 * by_hand


@pytest.mark.parametrize("method", SPECTRAL, ids=lambda method: method.name)
def test_full_fine_tunes_are_merged_whole(method):
    """Their many small directions matter together, although none of them is above rounding."""
    base, changes = make_experts(ranks=(112, 112), size=0.004)
    start = base.to(torch.bfloat16)
    models = [(start.double() + change).to(torch.bfloat16) for change in changes]
    # values of float64 have no rounding to cut
    of_float64 = [model.double() * (1 + 2.0**-40) for model in models]
    assert error(step(method, start, models), step(method, start.double(), of_float64)) < 1e-3


@pytest.mark.parametrize("method", SPECTRAL, ids=lambda method: method.name)
def test_changes_as_small_as_rounding_are_merged_all_the_same(method):
    """As of fine-tunes in bfloat16 by reinforcement learning, where few entries change, by a unit in the last place."""
    base, _ = make_experts()
    start = base.to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    models = []
    for _ in range(2):
        up = start.view(torch.int16) + (torch.rand(SHAPE, generator=generator) < 0.05)
        models.append(up.to(torch.int16).view(torch.bfloat16))
    assert step(method, start, models).norm() > 0
