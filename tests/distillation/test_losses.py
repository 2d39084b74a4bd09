"""Losses against float64 transcriptions, and the law: who says the same teaches nothing."""

from __future__ import annotations

import math

import pytest
import torch

from merganser.distillation.likelihoods import likelihoods
from merganser.distillation.losses.choice import average, avg_ce, min_ce
from merganser.distillation.losses.cross_entropy import taught_cross_entropy
from merganser.distillation.losses.gate import FusionGate
from merganser.distillation.losses.likelihood import chunk_log_probabilities, likelihood_loss
from tests.reference import fusion as reference

INF = math.inf


def test_cross_entropy_with_a_rest_and_without() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=torch.float64)
    ids = torch.tensor([[2, 5, 0], [-1, 1, -1], [6, 3, -1], [0, 1, 2]])
    p = torch.tensor([[0.5, 0.2, 0.1], [0, 0.7, 0], [0.6, 0.4, 0], [0.3, 0.3, 0.4]], dtype=torch.float64)
    rest = torch.tensor([0.2, 0.3, 0.0, 0.0], dtype=torch.float64)
    found = taught_cross_entropy(logits, ids, p.log(), rest.log())
    for row in range(4):
        known = [(i, share) for i, share in zip(ids[row].tolist(), p[row].tolist(), strict=True) if i >= 0]
        expected = reference.taught_cross_entropy(
            logits[row].tolist(), [i for i, _ in known], [share for _, share in known], float(rest[row])
        )
        assert float(found[row]) == pytest.approx(expected, rel=1e-12)
    low = taught_cross_entropy(logits.bfloat16(), ids, p.log(), rest.log())
    assert low.dtype == torch.float32


@pytest.mark.parametrize("k", [1, 4, 16, 50])
def test_a_source_equal_to_the_model_gives_no_gradient(k: int) -> None:
    torch.manual_seed(k)
    logits = (3 * torch.randn(20, 50)).requires_grad_()
    said, _ = likelihoods(logits.detach(), k, torch.zeros(20, dtype=torch.long))
    taught_cross_entropy(logits, said.ids, said.log_probabilities, said.rest).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert float(logits.grad.abs().max()) < 1e-6


def test_without_the_rest_the_gradient_vanishes_only_as_k_grows() -> None:
    torch.manual_seed(1)
    largest = []
    for k in (1, 4, 16, 50):
        logits = (3 * torch.randn(20, 50)).requires_grad_()
        said, _ = likelihoods(logits.detach(), k, torch.zeros(20, dtype=torch.long))
        shared = said.log_probabilities.log_softmax(-1)
        taught_cross_entropy(logits, said.ids, shared, torch.full((20,), -INF)).sum().backward()
        assert logits.grad is not None
        largest.append(float(logits.grad.abs().max()))
    assert largest[0] > largest[2] > 1e-4
    assert largest[3] < 1e-6


def test_a_source_that_says_something_else_does_teach() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    taught_cross_entropy(
        logits, torch.tensor([[1]]), torch.tensor([[0.9]]).log(), torch.tensor([0.1]).log()
    ).sum().backward()
    assert logits.grad is not None
    # q - p, what is left of p being divided among the others as q is
    torch.testing.assert_close(logits.grad, torch.tensor([[1 / 3 - 0.05, 1 / 3 - 0.9, 1 / 3 - 0.05]]))


def test_likelihood_loss() -> None:
    student = torch.tensor([-0.5, -3.0, -40.0, -1e-3, 0.0], dtype=torch.float64)
    source = torch.tensor([-0.7, -1.0, -90.0, -2.0, -1.0], dtype=torch.float64)
    for t in (1.0, 100.0):
        found = likelihood_loss(student, source, t)
        for i in range(4):
            expected = reference.likelihood_loss(float(student[i]), float(source[i]), t)
            assert float(found[i]) == pytest.approx(expected, rel=1e-9)
        assert found.isfinite().all()
    same = source.clone().requires_grad_()
    likelihood_loss(same, source).sum().backward()
    assert same.grad is not None
    assert float(same.grad.abs().max()) < 1e-12
    # a student that is certain, or hopeless, gets a gradient that is finite
    extreme = torch.tensor([0.0, -1e-9, -1e4]).requires_grad_()
    likelihood_loss(extreme, torch.tensor([-1.0, -1.0, -1.0])).sum().backward()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


def test_likelihoods_of_chunks() -> None:
    torch.manual_seed(2)
    logits, ids = torch.randn(2, 4, 6, dtype=torch.float64), torch.randint(6, (2, 4))
    numbers = torch.tensor([[-1, 0, 0, 1], [-1, -1, 2, -1]])
    found = chunk_log_probabilities(logits, ids, numbers, 3)
    logs = logits.log_softmax(-1)

    def of(row: int, place: int) -> float:
        return float(logs[row, place - 1, ids[row, place]])

    assert found.tolist() == pytest.approx([of(0, 1) + of(0, 2), of(0, 3), of(1, 2)], rel=1e-12)


CE = torch.tensor([[1.0, 0.5, 2.0], [0.5, 0.5, INF], [INF, INF, INF]], dtype=torch.float64)


def test_choices() -> None:
    assert min_ce(CE).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert average(CE).tolist() == [[1 / 3] * 3, [0.5, 0.5, 0], [0, 0, 0]]
    found = avg_ce(CE)
    for row in range(2):
        assert found[row].tolist() == pytest.approx(reference.avg_ce(CE[row].tolist()), rel=1e-12)
    assert found[2].tolist() == [0, 0, 0]
    # the order of sources changes nothing
    order = torch.tensor([2, 0, 1])
    for choose in (min_ce, avg_ce, average):
        torch.testing.assert_close(choose(CE[:1, order]), choose(CE[:1])[:, order])


def test_gate() -> None:
    torch.manual_seed(4)
    gate = FusionGate(3).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=1.5)
    linear = [layer for layer in gate.layers if isinstance(layer, torch.nn.Linear)]
    ce = torch.rand(6, 3, dtype=torch.float64) * 3
    weights, feedback = gate(ce)
    for row in range(6):
        expected = reference.gate(
            [layer.weight.tolist() for layer in linear], [layer.bias.tolist() for layer in linear], ce[row].tolist()
        )
        assert weights[row].tolist() == pytest.approx(expected, rel=1e-9)
    assert 0 < int((weights == 0).sum()) < 18
    assert float(feedback.detach()) == pytest.approx(reference.variation(weights.sum(0).tolist()), rel=1e-6)


def test_gate_when_sources_are_missing_or_many() -> None:
    torch.manual_seed(5)
    gate = FusionGate(3).double()
    weights, feedback = gate(CE)
    (weights.square().sum() + feedback).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in gate.parameters())
    assert weights.sum(-1).tolist() == pytest.approx([1, 1, 0])
    assert float(weights.detach()[1, 2]) == 0
    # ten equal shares are below the threshold: one counts
    many = FusionGate(10).double()
    for parameter in many.parameters():
        torch.nn.init.zeros_(parameter)
    assert many(torch.ones(1, 10, dtype=torch.float64))[0].tolist() == [[1, *[0] * 9]]
    assert float(FusionGate(1)(torch.ones(2, 1))[1].detach()) == 0
