"""The loss of a batch against plain loops, and its laws."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from merganser.distillation.alignment.answers import Reading
from merganser.distillation.alignment.chunks import Chunks
from merganser.distillation.alignment.transfer import Lesson
from merganser.distillation.likelihoods import likelihoods
from merganser.distillation.losses.gate import FusionGate
from merganser.distillation.training.batches import collate, whole_batch
from merganser.distillation.training.objective import Objective
from merganser.distillation.training.sequences import Cached, Example, _take
from tests.reference import fusion as reference

VOCABULARY = 9


def example(seed: int, n: int, sources: dict[int, float], *, k: int = 3, alm: bool = False) -> Example:
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, VOCABULARY, n)
    counted = np.ones(n, np.bool_)
    counted[n - 2] = False
    own = Example(0, Reading(ids, np.arange(n), counted, b"x" * n))
    for source, entropy in sources.items():
        logits = torch.tensor(draw.normal(size=(n, VOCABULARY)))
        said, _ = likelihoods(logits, k, torch.zeros(n, dtype=torch.long))
        positions = np.array([p for p in range(n - 1) if counted[p + 1]][source:])
        if alm:
            numbers = np.full(n, -1, np.int64)
            numbers[1:3] = 0
            numbers[n - 1] = 1
            own.lessons[source] = Chunks(numbers, draw.normal(-2, 0.5, 2).astype(np.float32))
        else:
            parts = [tensor.numpy()[positions] for tensor in (said.ids, said.log_probabilities, said.rest)]
            own.lessons[source] = Lesson(positions, *parts)
        own.cross_entropy[source] = entropy
    return own


def logits_of(batch: dict[str, torch.Tensor], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*batch["input_ids"].shape, VOCABULARY, generator=generator, dtype=torch.float64)


def literal(examples: list[Example], logits: torch.Tensor, shares: list[dict[int, float]], lambda_: float) -> float:
    """lambda * CE + (1 - lambda) * sum_s share_s * (what s says, or the text's token where it says nothing), per token."""
    total, count = 0.0, 0
    for b, own in enumerate(examples):
        for p in range(len(own.labels) - 1):
            if own.labels[p + 1] < 0:
                continue
            text = -reference.log_softmax(logits[b, p].tolist())[own.labels[p + 1]]
            taught = 0.0
            for s, share in shares[b].items():
                lesson = own.lessons[s]
                assert isinstance(lesson, Lesson)
                where = np.flatnonzero(lesson.positions == p)
                said = text
                if len(where):
                    i = int(where[0])
                    said = reference.taught_cross_entropy(
                        logits[b, p].tolist(),
                        lesson.ids[i].tolist(),
                        np.exp(lesson.log_probabilities[i].astype(np.float64)).tolist(),
                        math.exp(float(lesson.rest[i])),
                    )
                taught += share * said
            total += lambda_ * text + (1 - lambda_) * taught
            count += 1
    return total / count


EXAMPLES = [example(1, 7, {0: 1.0, 1: 0.5}), example(2, 5, {0: 0.7}), example(3, 6, {0: 0.2, 1: 0.9}, k=2)]
SHARES = {
    "min_ce": [{1: 1.0}, {0: 1.0}, {0: 1.0}],
    "average": [{0: 0.5, 1: 0.5}, {0: 1.0}, {0: 0.5, 1: 0.5}],
    "avg_ce": [
        dict(enumerate(reference.avg_ce([1.0, 0.5]))),
        {0: 1.0},
        dict(enumerate(reference.avg_ce([0.2, 0.9]))),
    ],
}


@pytest.mark.parametrize("choice", SHARES)
@pytest.mark.parametrize("lambda_", [0.0, 0.9, 1.0])
def test_the_loss_is_that_of_plain_loops(choice: str, lambda_: float) -> None:
    batch = collate(EXAMPLES, 2)
    logits = logits_of(batch)
    objective = Objective(lambda_, choice=choice)
    terms = objective(logits, batch["input_ids"], batch["labels"], batch["lesson"])
    assert float(objective.total(terms)) == pytest.approx(literal(EXAMPLES, logits, SHARES[choice], lambda_), rel=1e-6)


CUT = {
    # a source that teaches everything, one that teaches little, a sequence that nobody teaches
    "cross_entropy": [*EXAMPLES, example(9, 8, {})],
    "alm": [
        example(4, 7, {0: 1.0, 1: 0.4}, alm=True),
        example(5, 6, {1: 0.3}, alm=True),
        example(6, 12, {0: 0.6}, alm=True),
        example(9, 8, {}),
    ],
}


@pytest.mark.parametrize("cut", [[1, 1, 1, 1], [1, 3], [3, 1]])
@pytest.mark.parametrize("choice", [*SHARES, "gate"])
@pytest.mark.parametrize(("loss", "lambda_"), [("cross_entropy", 0.5), ("alm", 0.5), ("alm", 0.0), ("alm", 1.0)])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(
    loss: str, lambda_: float, choice: str, cut: list[int]
) -> None:
    torch.manual_seed(3)
    examples = CUT[loss]
    gate = FusionGate(2) if choice == "gate" else None
    objective = Objective(lambda_, loss, choice, 10.0, gate)
    batch = collate(examples, 2)
    logits = logits_of(batch).requires_grad_()
    own = [logits, *([] if gate is None or lambda_ == 1 else gate.parameters())]

    def gradients(value: torch.Tensor) -> list[torch.Tensor]:
        return [*torch.autograd.grad(value, own, allow_unused=True, materialize_grads=True)]

    whole = objective.total(objective(logits, batch["input_ids"], batch["labels"], batch["lesson"]))
    parts = [collate(examples[end - size : end], 2) for size, end in zip(cut, np.cumsum(cut), strict=True)]
    known = whole_batch(parts)
    total, sums, row = 0.0, [torch.zeros_like(each) for each in own], 0
    for part in parts:
        count, width = part["input_ids"].shape
        ids, labels, lesson = part["input_ids"], part["labels"], part["lesson"]
        terms = objective(logits[row : row + count, :width], ids, labels, lesson, known)
        value = objective.total(terms, known)
        total, row = total + float(value.detach()), row + count
        sums = [before + each for before, each in zip(sums, gradients(value), strict=True)]
    assert total == pytest.approx(float(whole.detach()), rel=1e-6)
    for found, expected in zip(sums, gradients(whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_order_of_sources_changes_nothing() -> None:
    def swapped(own: Example) -> Example:
        other = Example(own.record, own.reading)
        for s in own.lessons:
            other.lessons[1 - s], other.cross_entropy[1 - s] = own.lessons[s], own.cross_entropy[s]
        return other

    found = []
    for examples in (EXAMPLES, [swapped(own) for own in EXAMPLES]):
        batch = collate(examples, 2)
        objective = Objective(0.3, choice="avg_ce")
        terms = objective(logits_of(batch), batch["input_ids"], batch["labels"], batch["lesson"])
        found.append(float(objective.total(terms)))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("loss", ["cross_entropy", "alm"])
@pytest.mark.parametrize("choice", ["min_ce", "avg_ce"])
def test_sources_equal_to_the_student_give_no_gradient(loss: str, choice: str) -> None:
    torch.manual_seed(7)
    ids = torch.randint(VOCABULARY, (1, 6))
    logits = torch.randn(1, 6, VOCABULARY).requires_grad_()
    said, spoken = likelihoods(logits.detach()[0, :-1], 4, ids[0, 1:])
    own = Example(0, Reading(ids[0].numpy(), np.arange(6), np.ones(6, np.bool_), b""))
    for s in range(2):
        if loss == "alm":
            chunks = np.array([spoken[:2].double().sum(), spoken[2:].double().sum()], np.float32)
            own.lessons[s] = Chunks(np.array([-1, 0, 0, 1, 1, 1]), chunks)
        else:
            own.lessons[s] = Lesson(np.arange(5), said.ids.numpy(), said.log_probabilities.numpy(), said.rest.numpy())
        own.cross_entropy[s] = 1.0 + s
    batch = collate([own], 2)
    objective = Objective(0.0, loss, choice)
    terms = objective(logits, batch["input_ids"], batch["labels"], batch["lesson"])
    objective.total(terms).backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6


def test_likelihoods_of_chunks_are_those_of_their_source() -> None:
    examples = [example(4, 7, {0: 1.0, 1: 0.4}, alm=True), example(5, 6, {1: 0.3}, alm=True)]
    batch = collate(examples, 2)
    logits = logits_of(batch)
    for choice, shares in (("min_ce", [{1: 1.0}, {1: 1.0}]), ("average", [{0: 0.5, 1: 0.5}, {1: 1.0}])):
        objective = Objective(0.25, "alm", choice, 10.0)
        terms = objective(logits, batch["input_ids"], batch["labels"], batch["lesson"])
        total = weight = text = 0.0
        for b, own in enumerate(examples):
            spoken = [0.0, 0.0]
            for p in range(1, len(own.labels)):
                log_probability = reference.log_softmax(logits[b, p - 1].tolist())[int(own.reading.ids[p])]
                if own.labels[p] >= 0:
                    text -= log_probability
                number = next(iter(own.lessons.values())).numbers[p]  # type: ignore[union-attr]
                if number >= 0:
                    spoken[number] += log_probability
            for s, share in shares[b].items():
                said = own.lessons[s].log_probabilities.tolist()
                total += share * sum(reference.likelihood_loss(spoken[i], said[i], 10.0) for i in range(2))
                weight += 2 * share
        expected = 0.25 * text / terms.tokens + 0.75 * total / weight
        assert float(objective.total(terms)) == pytest.approx(expected, rel=1e-5)


def test_what_follows_a_debiased_chunk_is_part_of_it() -> None:
    examples = [example(4, 7, {0: 1.0}, alm=True), example(5, 6, {0: 0.3}, alm=True)]
    for own in examples:
        said = own.lessons[0]
        assert isinstance(said, Chunks)
        own.lessons[0] = Chunks(said.numbers, said.log_probabilities, np.array([2, len(own.labels) - 1]))
    batch = collate(examples, 1)
    logits = logits_of(batch)
    words = torch.tensor([i in (0, 4) for i in range(VOCABULARY)])
    objective = Objective(0.0, "alm", temperature=10.0, words=words)
    terms = objective(logits, batch["input_ids"], batch["labels"], batch["lesson"])
    total = 0.0
    for b, own in enumerate(examples):
        logs = [reference.log_softmax(row) for row in logits[b].tolist()]
        for number, (inside, end) in enumerate((([1, 2], 2), ([len(own.labels) - 1], len(own.labels) - 1))):
            spoken = sum(logs[p - 1][int(own.reading.ids[p])] for p in inside)
            spoken += math.log(sum(math.exp(logs[end][i]) for i in (0, 4)))
            said = own.lessons[0].log_probabilities.tolist()
            total += reference.likelihood_loss(spoken, said[number], 10.0)
    assert float(objective.total(terms)) == pytest.approx(total / 4, rel=1e-5)


def test_the_gate_learns_with_the_model() -> None:
    torch.manual_seed(3)
    gate = FusionGate(2)
    batch = collate(EXAMPLES, 2)
    objective = Objective(0.9, gate=gate)
    terms = objective(logits_of(batch), batch["input_ids"], batch["labels"], batch["lesson"])
    weights, feedback = gate(batch["lesson"]["cross_entropy"])
    assert float(terms.feedback.detach()) == pytest.approx(float(feedback.detach()))
    shares = [dict(enumerate(row)) for row in weights.tolist()]
    shares = [{s: share for s, share in row.items() if share} for row in shares]
    expected = literal(EXAMPLES, logits_of(batch), shares, 0.9) + 0.5 * float(feedback.detach())
    loss = objective.total(terms)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert any(float(own.grad.abs().max()) > 0 for own in gate.parameters() if own.grad is not None)


def test_sources_compare_whether_they_begin_with_a_special_token_or_not() -> None:
    """A model with one also predicts the first token of a text, which costs most; that does not count against it."""

    def read(*tokens: bytes) -> Reading:
        ends = np.cumsum([len(token) for token in tokens])
        return Reading(np.arange(len(tokens)), ends, np.ones(len(tokens), np.bool_), b"".join(tokens))

    lesson: Any = Lesson(
        np.arange(2), np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32), np.zeros(2, np.float32)
    )
    own, nothing = Example(1, read(b"ab", b"cd", b"ef")), SimpleNamespace()
    for number, (reading, nats) in enumerate(
        (
            (read(b"", b"ab", b"cd", b"ef"), [0, 9, 1, 2]),
            (read(b"ab", b"cd", b"ef"), [0, 1, 2]),
            (read(b"", b"abc", b"def"), [0, 9, 3]),
            # nothing else is said, so that it counts
            (read(b"", b"abcdef"), [0, 9]),
        )
    ):
        said: Any = Cached(1, reading, nothing, -np.array(nats, np.float32), nothing)  # type: ignore[arg-type]
        teacher: Any = SimpleNamespace(number=number, lesson=lambda *_: lesson)
        _take(own, own.reading, teacher, said)
    # two tokens of the student, of four bytes
    assert own.cross_entropy == pytest.approx({0: 3 / 2, 1: 3 / 2, 2: 3 * (4 / 3) / 2, 3: 9 * (4 / 6) / 2})


def test_a_batch_that_nobody_teaches_is_plain() -> None:
    batch = collate([example(1, 5, {})], 2)
    logits = logits_of(batch)
    for loss in ("cross_entropy", "alm"):
        objective = Objective(1.0, loss)
        plain = objective.total(objective(logits, batch["input_ids"], batch["labels"], batch["lesson"]))
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
        torch.testing.assert_close(plain, expected)
