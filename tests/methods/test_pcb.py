import math

import pytest
import torch

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.methods.pcb import pcb
from merganser.methods.ties import ties
from tests.methods.bars import assert_reaches_bars, error, make_models
from tests.methods.whole_model import merge_whole_model
from tests.reference.pcb import merge_flat
from tests.reference.pcb import pcb as reference

SETTINGS = [
    {},
    {"density": 1.0},
    {"density": [0.05, 0.4, 0.9], "lambda": 1.2, "weight": [0.8, 1.0, -1.3]},
    {"density": [0.0, 0.5, 0.00001]},
    {"form": "code"},
    {"form": "code", "density": 1.0, "clip": 0.0},
    {"form": "code", "density": [0.05, 0.4, 0.9], "lambda": 1.2, "weight": [0.8, 1.0, -1.3]},
    {"form": "code", "density": [0.0, 0.5, 0.7], "clip": 0.01},
]


def reference_of(base, models, **parameters):
    return reference(base, models, **{"lambda_" if k == "lambda" else k: v for k, v in parameters.items()})


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(parameters, change):
    base, models = make_models((80, 125), 3, change=change)
    assert_reaches_bars(pcb, reference_of, base, models, parameters)


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("n", [1, 2, 16])
def test_reaches_the_bars_with_other_numbers_of_models(n, form):
    base, models = make_models((40, 25), n)
    assert_reaches_bars(pcb, reference_of, base, models, {"form": form, "density": 0.3})


@pytest.mark.parametrize("form", ["paper", "code"])
def test_reaches_the_bars_on_a_million_elements(form):
    base, models = make_models((1000, 1000), 2)
    assert_reaches_bars(pcb, reference_of, base, models, {"form": form})


@pytest.mark.parametrize("form", ["paper", "code"])
def test_balance_over_the_model_is_that_of_one_long_tensor(form):
    tensors = [make_models((20, 30), 3, seed=1, change=0.01), make_models((500,), 3, seed=2, change=0.1)]
    merged = merge_whole_model(pcb, tensors, {"form": form})
    tau = torch.cat([torch.stack([(m.double() - b.double()).flatten() for m in models]) for b, models in tensors], 1)
    expected = merge_flat(tau, [1.0] * 3, [0.1] * 3, form, 1e-4)
    found = torch.cat([(m.double() - b.double()).flatten() for m, (b, _) in zip(merged, tensors, strict=True)])
    # the differences of rounded weights
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-8)
    # which the tensors are not on their own
    alone = merge_tensor(pcb, *tensors[0], {"form": form, "balance_over": "tensor"})
    assert error(merged[0] - tensors[0][0], (alone - tensors[0][0]).double()) > 0.01


def test_the_paper_by_hand():
    base = torch.zeros(3)
    models = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, -2.0])]

    def softmax(*x):
        return [math.exp(v) / sum(math.exp(u) for u in x) for v in x]

    # squares 1 0 4 and 1 16 4; products 1 0 -4
    intra = [softmax(0.5, 0, 2), softmax(0, 2, 2 / 5)]
    own, cross = [softmax(0.25, 0, 1), softmax(0, 1, 0.2)], softmax(1, 0.8, 0)
    first, second = ([intra[i][p] * (own[i][p] + cross[p]) for p in range(3)] for i in range(2))
    found = merge_tensor(pcb, base, models, {"density": 1})
    expected = [1, 4 * second[1] / (first[1] + second[1]), 2 * (first[2] - second[2]) / (first[2] + second[2])]
    assert found.tolist() == pytest.approx(expected)
    # two of three are kept, then one
    assert sorted(range(3), key=lambda p: first[p]) == [1, 0, 2]
    assert sorted(range(3), key=lambda p: second[p]) == [2, 0, 1]
    assert merge_tensor(pcb, base, models, {"density": 0.67}).tolist() == pytest.approx([1, 4, 2])
    assert merge_tensor(pcb, base, models, {"density": 0.34}).tolist() == pytest.approx([0, 4, 2])


def test_the_code_by_hand():
    base = torch.zeros(3)
    models = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, -1.0])]
    # sums 2 4 1; normalized magnitudes 0.5 0 1 and 0 1 0
    first = [math.exp(0.5) * math.tanh(2), 0, math.exp(2) * math.tanh(2)]
    second = [math.tanh(2), math.exp(2) * math.tanh(16), math.tanh(-1)]
    found = merge_tensor(pcb, base, models, {"form": "code", "density": 1, "clip": 0})
    lowest = second[2]
    shares = [[x / first[2] for x in first], [(x - lowest) / (second[1] - lowest) for x in second]]
    assert found.tolist() == pytest.approx([1, 4, 2])
    assert shares[0][1] == shares[1][2] == 0
    weighted = merge_tensor(pcb, base, models, {"form": "code", "density": 1, "clip": 0, "weight": [1, 3]})
    at_first = (shares[0][0] + 3 * shares[1][0]) / (shares[0][0] + shares[1][0])
    assert weighted.tolist() == pytest.approx([at_first, 12, 2])
    # what is at the cut weighs nothing
    half = merge_tensor(pcb, base, models, {"form": "code", "density": 0.66, "clip": 0})
    assert half.tolist() == pytest.approx([0, 4, 2])


def test_one_model_in_the_form_of_the_paper_is_trimmed_as_ties_does():
    base, (model,) = make_models((80, 125), 1)
    for density in (0.1, 0.37, 1.0):
        expected = merge_tensor(ties, base, [model], {"weight": 1, "density": density})
        found = merge_tensor(pcb, base, [model], {"density": density})
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_equal_models_stay_where_all_is_kept():
    base, (model,) = make_models((80, 125), 1)
    found = merge_tensor(pcb, base, [model] * 3, {"density": 1})
    torch.testing.assert_close(found, model, rtol=0, atol=1e-8)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_task_vectors_without_structure_are_averaged(form):
    constant = [torch.full((5,), step) for step in (0.25, 0.75)]
    assert merge_tensor(pcb, torch.zeros(5), constant, {"form": form}).tolist() == [0.5] * 5
    # which is so for a single number, too
    found = merge_tensor(pcb, torch.tensor(1.0), [torch.tensor(2.0), torch.tensor(4.0)], {"form": form})
    assert found.item() == 3


@pytest.mark.parametrize("form", ["paper", "code"])
def test_turning_the_task_vectors_turns_the_merge(form):
    base, models = make_models((80, 125), 3)
    zero, vectors = torch.zeros_like(base), [model - base for model in models]
    there = merge_tensor(pcb, zero, vectors, {"form": form})
    assert torch.equal(there, -merge_tensor(pcb, zero, [-vector for vector in vectors], {"form": form}))


def test_scaling_the_task_vectors_scales_the_merge_in_the_form_of_the_paper():
    base, models = make_models((80, 125), 3)
    zero, vectors = torch.zeros_like(base), [model - base for model in models]
    once = merge_tensor(pcb, zero, vectors)
    tiny = merge_tensor(pcb, zero, [vector * 2.0**-80 for vector in vectors])
    assert torch.equal(tiny * 2.0**80, once)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_models_that_did_not_change_give_the_base(form):
    base, (model,) = make_models((80, 125), 1)
    assert torch.equal(merge_tensor(pcb, base, [base] * 3, {"form": form}), base)
    opposite = [model, base - (model - base)]
    assert torch.isfinite(merge_tensor(pcb, base, opposite, {"form": form})).all()


def test_only_the_passes_of_one_form_are_made():
    paper, code = ({"form": form, "balance_over": "model"} for form in ("paper", "code"))
    assert [name for name, statistic in pcb.statistics.items() if statistic.wanted(paper)] == ["extent", "mean", "cut"]
    assert [name for name, statistic in pcb.statistics.items() if statistic.wanted(code)] == ["bounds", "cut"]
