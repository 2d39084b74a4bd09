import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.engine.fusion.run import Program
from merganser.engine.fusion.trace import Form
from merganser.method import takes
from merganser.ops.histogram import not_negative_entries
from merganser.ops.order import at_least, comparable, magnitude_cut, order_statistic


def run(statistic, blocks, **parameters):
    """Run a statistic over blocks of S value tensors as the engine does: add the counts, then solve."""
    given = {**parameters, "size": torch.tensor(sum(block[0].numel() for block in blocks), dtype=torch.float64)}

    def call(function, **more):
        known = {**given, **more}
        return function(**{name: known[name] for name in takes(function)})

    early = None
    for round_ in statistic.rounds:
        total = None
        for block in blocks:
            measured = call(round_.measure, models=block)
            total = measured if total is None else total + measured
        given["previous"] = call(round_.solve, measured=total)
        if round_.early is not None and early is None:
            early = round_.early(given["previous"])
    # what an earlier round knows is what the last one finds
    assert early is None or torch.equal(early, given["previous"])
    return given["previous"]


def values(models):
    return models


def kth_largest(tensors, wanted, *, wide=False, cut=1):
    """Return the statistic of `wanted` ranks (the same for each tensor), measured over `cut` blocks."""
    ranks = torch.tensor([wanted] * len(tensors))
    statistic = order_statistic(values, lambda size: ranks, wide=wide)
    blocks = list(zip(*[tensor.tensor_split(cut) for tensor in tensors], strict=True))
    return run(statistic, blocks)


def sorted_kth(tensor, wanted):
    found = sorted(tensor.double().reshape(-1).tolist(), reverse=True)
    return [math.inf if k <= 0 else 0.0 if k > len(found) else found[k - 1] for k in wanted]


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("bits", [16, 32])
def test_finds_what_a_sort_finds(scale, bits):
    generator = torch.Generator().manual_seed(0)
    tensors = [(torch.randn(2011, generator=generator) * scale).abs() for _ in range(2)]
    if bits == 16:
        tensors = [tensor.bfloat16().float() for tensor in tensors]
    wanted = [1, 2, 1000, 1500, 2010, 2011]
    found = kth_largest(tensors, wanted)
    assert found.shape == (2, 6)
    assert found.dtype == torch.float64
    assert found.tolist() == [sorted_kth(tensor, wanted) for tensor in tensors]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=40),
    st.data(),
)
def test_finds_what_a_sort_finds_in_any_list(numbers, data):
    tensor = torch.tensor(numbers, dtype=torch.float32)
    wanted = data.draw(st.lists(st.integers(-1, len(numbers) + 2), min_size=1, max_size=3))
    assert kth_largest([tensor], wanted).tolist() == [sorted_kth(tensor, wanted)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-40, 0.5, 0.5000001, 1.0, 1.0078125, 3e38]), min_size=1, max_size=30),
    st.integers(1, 30),
)
def test_ties_count_one_by_one(numbers, k):
    tensor = torch.tensor(numbers, dtype=torch.float32)
    assert kth_largest([tensor], [k]).tolist() == [sorted_kth(tensor, [k])]


@pytest.mark.parametrize("wide", [False, True])
def test_ranks_outside_the_tensor(wide):
    tensor = torch.tensor([3.0, 1.0, 2.0])
    found = kth_largest([tensor.double() if wide else tensor], [-5, 0, 1, 3, 4, 100], wide=wide)
    found = found.view(torch.float64) if wide else found
    assert found.tolist() == [[math.inf, math.inf, 3.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("wide", [False, True])
def test_blocks_do_not_matter(wide):
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64).abs()
    tensor = tensor if wide else tensor.float()
    whole = kth_largest([tensor], [1, 17, 2500, 5000], wide=wide)
    for cut in (2, 7, 100):
        assert torch.equal(kth_largest([tensor], [1, 17, 2500, 5000], wide=wide, cut=cut), whole)


def test_float64_is_cut_to_float32_downwards():
    step = 2.0**-23
    tensor = torch.tensor([1 + 0.1 * step, 1 + 0.9 * step, 1 + 1.1 * step, 2.0], dtype=torch.float64)
    assert kth_largest([tensor], [1, 2, 3, 4]).tolist() == [[2.0, 1 + step, 1.0, 1.0]]
    assert comparable(tensor).tolist() == [1.0, 1.0, 1 + step, 2.0]
    # what reaches the cut is what the statistic counted as reaching it
    assert (tensor >= kth_largest([tensor], [2])[0, 0]).sum() == 2


def test_comparable_leaves_float32_alone():
    tensor = torch.tensor([0.1, 3.0])
    assert comparable(tensor) is tensor


def test_negative_zero_is_zero():
    assert kth_largest([torch.tensor([-0.0, 1.0, -0.0])], [1, 2, 3]).tolist() == [[1.0, 0.0, 0.0]]


def test_what_lies_halfway_between_two_of_bfloat16():
    # 1, the next of bfloat16, and the one after it: even, odd, even
    odd = 0x3F81
    bits = [(odd << 16) + half + step for half in (-0x8000, 0x8000) for step in (-1, 0, 1)]
    tensor = torch.tensor([*bits, odd << 16, (odd - 1) << 16], dtype=torch.int32).view(torch.float32)
    wanted = list(range(1, len(tensor) + 1))
    assert kth_largest([tensor], wanted).tolist() == [sorted_kth(tensor, wanted)]


def test_the_largest_numbers_and_infinity():
    largest = torch.finfo(torch.float32).max
    tensor = torch.tensor([largest, largest * (1 - 2.0**-20), math.inf, 1.0])
    assert kth_largest([tensor], [1, 2, 3, 4]).tolist() == [sorted_kth(tensor, [1, 2, 3, 4])]


def test_numbers_that_are_none_do_not_stop_the_count():
    tensor = torch.tensor([math.nan, -math.nan, 1.0, 2.0] * 16)
    assert kth_largest([tensor], [64]).tolist() == [[1.0]]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.025, 0.05, 0.0999, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 8, 10, 4001])
def test_the_few_are_found_however_few(share, size):
    values = np.full(size, -1.0, dtype=np.float32)
    places = np.random.default_rng(0).permutation(size)[: round(share * size)]
    values[places] = places
    assert not_negative_entries(values).tolist() == sorted(places.tolist())


def test_a_wide_statistic_tells_apart_what_float32_does_not():
    generator = torch.Generator().manual_seed(2)
    tensor = 1 + torch.rand(300, generator=generator, dtype=torch.float64) * 2.0**-20
    assert len(tensor.float().unique()) < 20
    for k in (1, 2, 150, 299, 300):
        cut = kth_largest([tensor], [k], wide=True)
        assert cut.dtype == torch.int64
        assert at_least(tensor, cut[0, 0]).sum() == k
        # to 2**-36 of its size, downwards
        exact = sorted_kth(tensor, [k])[0]
        assert 0 <= exact - float(cut.view(torch.float64)) <= 2.0**-36


def test_a_wide_statistic_of_tiny_numbers():
    tensor = torch.tensor([1e-150, 2e-150, 3e-60, 0.0], dtype=torch.float64)
    for k in (1, 2, 3):
        assert at_least(tensor, kth_largest([tensor], [k], wide=True)[0, 0]).sum() == k


@pytest.mark.parametrize("wide", [False, True])
def test_ranks_can_depend_on_how_many_are_positive(wide):
    dtype = torch.float64 if wide else torch.float32
    tensors = [torch.tensor([0.0, 4.0, 0.0, 2.0, 1e-30, 3.0], dtype=dtype), torch.zeros(6, dtype=dtype)]
    statistic = order_statistic(values, lambda positive: positive.long().unsqueeze(1), wide=wide)
    found = run(statistic, [tensors])
    found = found.view(torch.float64) if wide else found
    assert found[0].item() == pytest.approx(1e-30)
    assert found[1].item() == math.inf


def density_cut(tensors, density):
    given = torch.tensor(density, dtype=torch.float64)
    return run(magnitude_cut(values), [tensors], density=given)[:, 0].tolist()


def test_the_cut_of_a_density():
    tensor = torch.arange(1.0, 101.0)
    # floor(0.29 * 100) is 28 in binary, as everywhere in Python
    densities = [0.0, 0.001, 0.01, 0.1, 0.29, 0.999, 1.0]
    assert density_cut([tensor] * 7, densities) == [math.inf, 100, 100, 91, 73, 2, 1]


def test_nothing_is_measured_where_nothing_is_trimmed():
    statistic = magnitude_cut(values)
    assert not statistic.wanted({"density": (1.0, 1.0)})
    assert statistic.wanted({"density": (1.0, 0.9)})


@pytest.mark.parametrize("wide", [False, True])
def test_fused_histograms_count_the_same(wide):
    tensors = [torch.randn(5000, dtype=torch.float64 if wide else torch.float32).abs() for _ in range(2)]
    statistic = order_statistic(values, lambda size: torch.tensor([[10, 100], [20, 6000]]), wide=wide)
    known = {"size": torch.tensor(5000.0, dtype=torch.float64)}
    for round_ in statistic.rounds:
        names = [name for name in takes(round_.measure) if name != "models"]

        def measure(first, second, *rest, call=round_.measure, names=names):
            return [call(models=[first, second], **dict(zip(names, rest, strict=True)))]

        fixed = [known[name] for name in names]
        forms = [Form("block", tensors[0].dtype)] * 2 + [Form("fixed", torch.int64, tuple(x.shape)) for x in fixed]
        (fused,) = Program(measure, forms).bind(fixed)(tensors)
        assert torch.equal(fused, measure(*tensors, *fixed)[0])
        assert fused.any()
        more = {name: known[name] for name in takes(round_.solve) if name != "measured"}
        known["previous"] = round_.solve(measured=fused, **more)


def test_a_second_round_is_left_out_where_the_first_one_found_numbers_of_bfloat16():
    exact = torch.tensor([0.0, 1.0, 1.0078125, 2.0, math.inf])
    statistic = order_statistic(values, lambda size, wanted: wanted)

    def early(tensor, *wanted):
        first = statistic.rounds[0]
        size = torch.tensor(float(len(tensor)), dtype=torch.float64)
        found = first.solve(measured=first.measure(models=[tensor]), size=size, wanted=torch.tensor([wanted]))
        answer = first.early(found)
        return None if answer is None else answer.tolist()[0]

    assert early(exact, 0, 1, 2, 3, 4, 5, 6) == [math.inf, math.inf, 2.0, 1.0078125, 1.0, 0.0, 0.0]
    for odd in (1.001, 1e-42, 3e-41, 6e-41, 3.4e38):
        others = torch.cat([exact, torch.tensor([odd])])
        place = int((exact > odd).sum()) + 1
        assert early(others, place) is None
        assert early(others, 1, place) is None
        assert early(others, place - 1, place + 1) == [float(exact[-place + 1]), float(exact[-place])]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, 1e-42, 0.25, 0.25000003, 1.0, 1.5, 3e38]) | st.floats(0, 2), min_size=1, max_size=40
    ),
    st.lists(st.integers(-1, 42), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_one_block_at_once_gives_what_the_rounds_give(numbers, wanted, dtype, wide):
    tensor = torch.tensor(numbers, dtype=torch.float64 if wide else dtype)
    ranks = torch.tensor([wanted])
    statistic = order_statistic(values, lambda size, positive: ranks.clamp(max=positive.long() + 1), wide=wide)
    measured = torch.stack([statistic.at_once.measure({"models": [found]}) for found in (tensor, tensor.flip(0))])
    size = torch.tensor(float(len(numbers)), dtype=torch.float64)
    at_once, flipped = statistic.at_once.solve(measured, {"size": size}, {})
    assert torch.equal(at_once, flipped)
    rounds = run(statistic, [[tensor]])
    assert at_once.dtype == rounds.dtype
    assert torch.equal(at_once, rounds)
