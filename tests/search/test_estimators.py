"""Estimators of the accuracy on all items: against the literal form, their laws, and searches that use them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merganser.search import Found, search
from merganser.search.estimators import ESTIMATORS, Items, Seen, fit_ability, fit_items
from merganser.search.estimators.irt import fit_mixture
from merganser.search.study import Asked, Study
from tests.cli.tiny import run
from tests.evaluation.tiny import text
from tests.reference import irt as reference
from tests.search.conftest import RECIPE
from tests.search.test_run import Stop, figures, table


def drawn(count: int, seed: int = 0) -> tuple[Items, np.random.Generator]:
    chance = np.random.default_rng(seed)
    return Items(np.exp(0.4 * chance.normal(size=(count, 1))), chance.normal(size=count)), chance


def answers_of(items: Items, ability: float, chance: np.random.Generator) -> np.ndarray[Any, Any]:
    return (chance.random(len(items.difficulty)) < items.probability(np.array([ability]))).astype(np.float64)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("ability", [-2.0, 0.3, 9.0])
def test_against_the_reference(name: str, ability: float) -> None:
    items, chance = drawn(60)
    parents = np.array([[-0.5], [0.2], [0.9]])
    where = np.array([*range(0, 60, 4)])
    answers = answers_of(items, ability, chance)[where]
    seen = dict(zip(where.tolist(), answers.tolist(), strict=True))
    a, b = items.discrimination[:, 0].tolist(), items.difficulty.tolist()
    expected = reference.estimate(name, a, b, seen, parents[:, 0].tolist())
    # minima are flat: abilities are found to about the root of the float64 precision
    assert ESTIMATORS[name](Seen(items, where, answers, parents)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_if_all_items_were_seen_it_is_the_mean(name: str, right: float) -> None:
    items, _ = drawn(20)
    answers = (np.arange(20) < 20 * right).astype(np.float64)
    assert ESTIMATORS[name](Seen(items, np.arange(20), answers, np.array([[0.1], [1.0]]))) == pytest.approx(right, abs=1e-15)  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("answer", [0.0, 1.0])
def test_estimates_are_accuracies(name: str, answer: float) -> None:
    items, _ = drawn(30)
    found = ESTIMATORS[name](Seen(items, np.arange(3), np.full(3, answer), np.array([[-40.0], [40.0]])))
    assert 0 <= found <= 1
    assert found != pytest.approx(1 - answer, abs=0.2)


def test_mixtures_of_several_abilities() -> None:
    chance = np.random.default_rng(3)
    items = Items(chance.normal(size=(400, 2)), chance.normal(size=400))
    parents = np.array([[2.0, 0.0], [0.0, 2.0], [-2.0, -2.0]])
    # answers are those of the first parent, in expectation
    found = fit_mixture(items, items.probability(parents[0]), parents)
    assert found == pytest.approx(parents[0], abs=1e-4)
    middle = parents.mean(0)
    assert fit_mixture(items, items.probability(middle), parents) == pytest.approx(middle, abs=1e-4)
    # outside the triangle: the edge, not beyond it
    beyond = fit_mixture(items, items.probability(np.array([4.0, 4.0])), parents)
    assert beyond.sum() == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("models", [5, 14])
def test_fitted_items_are_the_most_probable(models: int) -> None:
    items, chance = drawn(25, 1)
    answers = np.stack([answers_of(items, float(each), chance) for each in np.linspace(-1.5, 1.5, models)])
    fitted = fit_items(answers)
    sharp = models >= 12
    assert bool((fitted.discrimination == 1).all()) is not sharp
    if sharp:
        # at a minimum the slope of the posterior is 0, with the abilities at theirs
        a = torch.tensor(fitted.discrimination[:, 0], dtype=torch.float64, requires_grad=True)
    else:
        a = torch.ones(25, dtype=torch.float64)
    b = torch.tensor(fitted.difficulty, dtype=torch.float64, requires_grad=True)
    ability = torch.tensor(np.stack([fit_ability(fitted, each) for each in answers])[:, 0])
    p = torch.sigmoid(ability[:, None] * a - b)
    y = torch.tensor(answers)
    loss = -(y * p.log() + (1 - y) * (1 - p).log()).sum() + (b**2).sum() / 8 + (a.log() ** 2).sum() * 2
    loss.backward()
    assert b.grad is not None
    assert float(b.grad.abs().max()) < 1e-3
    if a.grad is not None:
        assert float(a.grad.abs().max()) < 1e-3


def test_fitted_difficulties_are_those_of_the_items() -> None:
    items, chance = drawn(150, 2)
    answers = np.stack([answers_of(items, float(each), chance) for each in chance.normal(size=30)])
    assert np.corrcoef(fit_items(answers).difficulty, items.difficulty)[0, 1] > 0.85


@pytest.fixture
def quiz(tmp_path: Path) -> str:
    lines = [{"context": text(i, 6).strip(), "choices": [" cat", " on a mat"], "gold": i % 2} for i in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "q.jsonl")


def searched(out: Path, quiz: str, **options: Any) -> Found:
    recipe = RECIPE.replace("[-1, 1]", "[-6, 6]")
    return search(recipe, out, [quiz], **{"trials": 6, "sampler": "random", "dtype": "float32", **options})


@pytest.mark.parametrize("name", ["p_irt", "gmp_irt"])
def test_a_search_with_parameters_from_a_file(tmp_path: Path, quiz: str, name: str) -> None:
    items, _ = drawn(40)
    a, b = items.discrimination[:, 0].tolist(), items.difficulty.tolist()
    (tmp_path / "p.json").write_text(json.dumps({"q": {"discrimination": a, "difficulty": b}}))
    found = searched(tmp_path / "out", quiz, estimator=name, item_parameters=tmp_path / "p.json")
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]

    def answers(model: str) -> dict[int, float]:
        own = [e["content"] for e in lines if e.get("model") == model and e["batch"] >= 0]
        return {i: float(y) for c in own for i, y in zip(c["items"], c["columns"]["correct"], strict=True)}

    order = sorted(answers("base"))
    assert len(order) == 20
    part = ([a[i] for i in order], [b[i] for i in order])
    parents = [reference.own_ability(*part, [answers(model)[i] for i in order]) for model in ("base", "a", "b")]
    ended = [trial for trial in found.trials if trial.stopped]
    assert ended
    best = found.trials[0]
    for trial in found.trials:
        assert trial.values is not None
        assert best.values is not None
        if trial.stopped:
            seen = {order.index(i): y for i, y in answers(trial.name).items()}
            assert trial.items == len(seen) == 5
            assert trial.values[0] == pytest.approx(reference.estimate(name, *part, seen, parents), abs=1e-5)
            assert trial.values[0] <= best.values[0]
        else:
            assert trial.items == 20
            assert trial.values[0] == pytest.approx(sum(answers(trial.name).values()) / 20)
            best = max(best, trial, key=lambda each: each.values or ())
    assert found.best == best


def test_a_search_that_fits_its_own_parameters_continues(
    tmp_path: Path, quiz: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = searched(tmp_path / "whole", quiz, estimator="mp_irt", trials=12)
    assert not any(trial.stopped for trial in whole.trials[:8])
    assert any(trial.stopped and trial.items == 5 for trial in whole.trials[8:])
    with pytest.raises(ZeroDivisionError):
        searched(tmp_path / "cut", quiz, estimator="mp_irt", trials=12, progress=Stop(3, ZeroDivisionError))
    tell = Study.tell

    def failing(self: Study, asked: Asked, *rest: Any) -> None:
        if asked.number == 7:
            raise ZeroDivisionError
        tell(self, asked, *rest)

    # killed between the last score of a trial and its end: its own answers must not count for its estimate
    monkeypatch.setattr(Study, "tell", failing)
    with pytest.raises(ZeroDivisionError):
        searched(tmp_path / "cut", quiz, estimator="mp_irt", trials=12)
    monkeypatch.setattr(Study, "tell", tell)
    again = searched(tmp_path / "cut", quiz, estimator="mp_irt", trials=12)
    assert figures(again) == figures(whole)
    assert table(tmp_path / "cut") == table(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quiz.jsonl", "--estimator", "gmp_it"), "estimator: 'gmp_it' is not known. Did you mean 'gmp_irt'? Known: control_variate, p_irt, gp_irt"),
        (("one.jsonl", "--estimator", "p_irt"), "p_irt is for right and wrong answers, and one.jsonl is a text"),
        (("quiz.jsonl", "--item-parameters", "p.json"), "item-parameters: are for an estimator; give --estimator, too"),
        (("quiz.jsonl", "--estimator", "p_irt", "--no-early-stopping"), "ends trials early, which --no-early-stopping forbids"),
        (("quiz.jsonl", "--estimator", "p_irt", "--objective", "quiz/accuracy_norm"), "quiz/accuracy_norm is not estimated"),
        (("quiz.jsonl", "--estimator", "p_irt", "--at-least", "quiz/accuracy_norm=0"), "quiz/accuracy_norm is not estimated"),
        (("quiz.jsonl", "--estimator", "p_irt", "--objective", "quiz/accuracy", "0.5*quiz/accuracy"), "estimator: takes one objective"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    found = run("search", tmp_path / "r.yaml", tmp_path / "out", "--tasks", *arguments)
    assert found.code == 2, found.err
    assert message in found.err
    assert not (tmp_path / "out").exists()


def test_a_command_has_no_items(tmp_path: Path) -> None:
    from merganser.errors import MergeError

    with pytest.raises(MergeError, match="a command gives only figures"):
        search(RECIPE, tmp_path / "out", command="x {model}", estimator="p_irt", objectives=["s:maximize"])


GOOD: dict[str, Any] = {"discrimination": [1.0] * 4, "difficulty": [0.0] * 4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "q: expected an object with discrimination and difficulty, got nothing"),
        ({"q": GOOD, "r": GOOD}, "'r' is not a task here"),
        ({"q": [1]}, "q: expected an object with discrimination and difficulty, got list"),
        ({"q": GOOD | {"difficult": []}}, "unknown key 'difficult'. Did you mean 'difficulty'?"),
        ({"q": {"difficulty": [0.0] * 4}}, "q: discrimination: expected a list of 4 numbers, got nothing"),
        ({"q": GOOD | {"difficulty": [0.0] * 3}}, "q: difficulty: has 3 entries, and the task has 4 items here"),
        ({"q": GOOD | {"difficulty": [0.0, 1.0, True, "1"]}}, "holds something that is not a number"),
        ({"q": GOOD | {"difficulty": [[0.0]] * 4}}, "q: difficulty: expected one number per item, got lists"),
        ({"q": GOOD | {"discrimination": [[1.0], 1.0, 1.0, 1.0]}}, "lists of as many numbers"),
        ({"q": GOOD | {"discrimination": [[]] * 4}}, "lists of as many numbers"),
        ({"q": GOOD | {"difficulty": [1e999, 0, 0, 0]}}, "finite"),
        (None, "no such file"),
    ],
)
def test_parameters_that_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    from merganser.errors import MergeError
    from merganser.search.estimators import read_parameters

    file = tmp_path / "p.json"
    if content is not None:
        file.write_text(json.dumps(content))
    with pytest.raises(MergeError) as caught:
        read_parameters(file, {"q": 4})
    assert message in str(caught.value)


def test_parameters_with_several_abilities(tmp_path: Path) -> None:
    from merganser.search.estimators import read_parameters

    (tmp_path / "p.json").write_text(json.dumps({"q": GOOD | {"discrimination": [[1, 2]] * 4}}))
    assert read_parameters(tmp_path / "p.json", {"q": 4})["q"].discrimination.shape == (4, 2)
