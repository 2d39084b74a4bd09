import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.engine.fusion.run import Program
from merganser.engine.fusion.trace import Form
from merganser.ops.random import Random, keys
from tests.reference.draws import draws

SIZE = 1 << 18
# standard deviations: a fair draw fails one of about 50 such checks once in 30,000 runs, and the seeds are fixed
FAR = 5.0


def uniform(seed=0, tensor="model.layers.0.mlp.up_proj.weight", model=0, shape=(SIZE,), offset=0):
    return Random(keys(seed, tensor, model + 1), torch.tensor(offset)).uniform(model, shape)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**63),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.integers(0, 5),
    st.one_of(st.integers(0, 2**45), st.integers(2**31 - 50, 2**31 + 50), st.integers(2**32 - 50, 2**32 + 50)),
)
def test_agrees_with_the_definition(seed, tensor, model, offset):
    found = uniform(seed, tensor, model, (60,), offset).double().numpy()
    assert np.array_equal(found, draws(seed, tensor, model, 60, offset))


def test_is_a_multiple_of_two_to_the_minus_24_below_one():
    drawn = uniform()
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0
    assert drawn.max() < 1
    steps = drawn.double() * 2**24
    assert torch.equal(steps, steps.round())


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**62])
@pytest.mark.parametrize("offset", [0, 2**31 - SIZE // 2, 2**32 - SIZE // 2, 5 * 2**32])
def test_is_uniform(seed, offset):
    drawn = uniform(seed, offset=offset).double()
    assert abs(drawn.mean() - 0.5) < FAR * math.sqrt(1 / 12 / SIZE)
    assert abs(drawn.var() - 1 / 12) < FAR * math.sqrt(1 / 180 / SIZE)
    for bins in (2, 100, 4096):
        counts = torch.bincount((drawn * bins).long(), minlength=bins).double()
        chi2 = ((counts - SIZE / bins) ** 2 / (SIZE / bins)).sum()
        assert abs(chi2 - (bins - 1)) < FAR * math.sqrt(2 * (bins - 1)), f"{bins} bins"


def test_every_bit_is_fair():
    words = (uniform().double() * 2**24).long()
    for bit in range(24):
        assert abs(((words >> bit) & 1).double().mean() - 0.5) < FAR * 0.5 / math.sqrt(SIZE), f"bit {bit}"


def correlation(a, b):
    a, b = a.double() - 0.5, b.double() - 0.5
    return abs(float((a * b).mean() * 12)) * math.sqrt(len(a))


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 64, 896, 1024, 4096, 65536])
def test_neighbours_are_independent(lag):
    drawn = uniform()
    assert correlation(drawn[lag:], drawn[:-lag]) < FAR
    # both in the same quarter, as often as by chance
    same = ((drawn[lag:] * 4).long() == (drawn[:-lag] * 4).long()).double().mean()
    assert abs(same - 0.25) < FAR * math.sqrt(0.25 * 0.75 / SIZE)


@pytest.mark.parametrize(
    "other",
    [
        {"model": 1},
        {"model": 2},
        {"seed": 1},
        {"seed": 2**32},
        {"tensor": "model.layers.1.mlp.up_proj.weight"},
        {"tensor": "model.layers.0.mlp.up_proj.bias"},
        {"offset": SIZE},
        {"offset": 2**32},
        {"offset": 2**33},
    ],
    ids=str,
)
def test_streams_are_independent(other):
    first, second = uniform(), uniform(**other)
    assert correlation(first, second) < FAR
    same = ((first * 16).long() == (second * 16).long()).double().mean()
    assert abs(same - 1 / 16) < FAR * math.sqrt(1 / 16 * 15 / 16 / SIZE)
    # nor is one a shifted or turned copy of the other
    assert correlation(first[1:], second[:-1]) < FAR
    assert correlation(first, second.flip(0)) < FAR


def test_pairs_of_models_fill_the_square():
    first, second = uniform(model=0), uniform(model=1)
    counts = torch.bincount((first * 32).long() * 32 + (second * 32).long(), minlength=1024).double()
    chi2 = ((counts - SIZE / 1024) ** 2 / (SIZE / 1024)).sum()
    assert abs(chi2 - 1023) < FAR * math.sqrt(2 * 1023)


@pytest.mark.parametrize("offset", [0, 2**31 - 300, 2**32 - 300, 2**40 - 300])
def test_blocks_and_layout_do_not_matter(offset):
    whole = uniform(shape=(600,), offset=offset)
    parts = [uniform(shape=(stop - start,), offset=offset + start) for start, stop in ((0, 1), (1, 333), (333, 600))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(uniform(shape=(20, 30), offset=offset).view(-1), whole)
    assert torch.equal(uniform(shape=(5, 4, 30), offset=offset).view(-1), whole)
    assert torch.equal(uniform(shape=(10, 30), offset=offset + 300), whole[300:].view(10, 30))


def test_the_number_of_models_does_not_matter():
    assert torch.equal(keys(3, "a", 5)[:2], keys(3, "a", 2))


def test_keys_do_not_run_into_each_other():
    found = {tuple(keys(seed, tensor, 1)[0].tolist()) for seed in (1, 11) for tensor in ("1.a", "a", "", "\0")}
    assert len(found) == 8


def test_no_shape():
    assert uniform(shape=()).shape == ()
    assert uniform(shape=(0,)).shape == (0,)
    assert uniform(shape=(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_keep_compares_exactly(probability):
    rng = Random(keys(0, "a", 1), torch.tensor(0))
    kept = rng.keep(0, (SIZE,), torch.tensor(probability, dtype=torch.float64))
    assert torch.equal(kept, rng.uniform(0, (SIZE,)).double() < probability)
    assert abs(kept.double().mean() - probability) <= FAR * math.sqrt(probability * (1 - probability) / SIZE)


def test_keep_does_not_round_the_probability():
    rng = Random(keys(0, "a", 1), torch.tensor(0))
    drawn = rng.uniform(0, (SIZE,)).double()
    # the nearest float32 of this number is the draw itself, which lies below it
    largest = drawn.max()
    probability = largest + 2.0**-30
    assert probability.float() == largest
    assert rng.keep(0, (SIZE,), probability).all()
    assert rng.keep(0, (SIZE,), largest).sum() == (drawn < largest).sum()


def test_keep_by_element():
    rng = Random(keys(0, "a", 1), torch.tensor(0))
    probability = torch.linspace(0, 1, SIZE)
    assert torch.equal(rng.keep(0, (SIZE,), probability), rng.uniform(0, (SIZE,)) < probability)


def test_fused_draws_are_the_same_bits():
    def draw(like, offset, keys):
        return [Random(keys, offset).uniform(1, like.shape) + like]

    forms = [Form("block", torch.float32), Form("scalar", torch.int64), Form("fixed", torch.int32, (2, 2))]
    fused = Program(draw, forms).bind([keys(0, "a", 2)])
    # lengths that vector instructions do not divide; indices that overflow 31 and 32 bits
    for size in (1003, 4096, 17):
        for offset in (0, 5, 2**31 - 500, 2**32 - 500, 2**33 + 1):
            like = torch.zeros(size)
            (found,), (expected,) = fused([like, offset]), draw(like, torch.tensor(offset), keys(0, "a", 2))
            assert torch.equal(found, expected)
