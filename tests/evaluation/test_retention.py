"""What a merge kept and forgot, on figures with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from merganser.evaluation.retention import Retention, measure_retention
from merganser.evaluation.scoring.estimate import Estimate

METRICS = {"french": "bits_per_byte", "quiz": "accuracy", "english": "bits_per_byte", "facts": "accuracy"}
HIGHER = {"french": False, "quiz": True, "english": False, "facts": True}
EXPERTS = {"french": "fr", "quiz": "q"}


def around(value: float, task: str, noise: float = 0.01, seed: int = 0) -> Estimate:
    """A figure with the scatter that all models share, and a little of its own."""
    draw = np.random.default_rng(seed)
    own = noise * draw.normal(size=400)
    own -= own.mean()
    shared = np.sin(np.arange(400.0))
    return Estimate.of_ratio(value + shared - shared.mean() + own, np.ones(400), task)


def scales(**changes: float) -> Retention:
    values = {
        "base": {"french": 1.5, "quiz": 0.4, "english": 1.0, "facts": 0.5},
        "fr": {"french": 1.1, "quiz": 0.4, "english": 1.1, "facts": 0.5},
        "q": {"french": 1.5, "quiz": 0.8, "english": 1.0, "facts": 0.4},
        "merged": {"french": 1.2, "quiz": 0.5, "english": 1.05, "facts": 0.45},
    }
    for name, value in changes.items():
        model, task = name.split("_")
        values[model][task] = value
    made = {
        model: {task: around(value, task, seed=i) for task, value in own.items() if value is not None}
        for i, (model, own) in enumerate(values.items())
    }
    return measure_retention(made, "base", EXPERTS, METRICS, HIGHER)


def test_known_answers() -> None:
    found = scales().to_json()
    merged = found["models"]["merged"]
    assert merged["recovered"]["french"]["value"] == pytest.approx(0.75)
    assert merged["recovered"]["quiz"]["value"] == pytest.approx(0.25)
    assert merged["mean"]["value"] == pytest.approx(0.5)
    assert merged["mean"]["domains"] == 2
    assert (merged["worst"]["domain"], merged["worst"]["value"]) == ("quiz", pytest.approx(0.25))
    assert merged["forgotten"]["english"]["value"] == pytest.approx(0.05)
    assert merged["forgotten"]["english"]["relative"] == pytest.approx(0.05)
    assert merged["forgotten"]["facts"]["value"] == pytest.approx(0.05)
    assert merged["forgotten"]["facts"]["relative"] == pytest.approx(0.1)
    assert merged["mean_forgotten"]["value"] == pytest.approx(0.075)
    # each expert keeps all of its own domain, and nothing of the other
    assert found["best_single"]["recovered"]["value"] == pytest.approx(0.5)
    assert merged["against_best_single"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["models"]["fr"]["recovered"]["french"]["value"] == pytest.approx(1)
    assert found["models"]["fr"]["recovered"]["french"]["stderr"] == pytest.approx(0, abs=1e-12)
    assert "base" not in found["models"]


def test_standard_errors_are_paired() -> None:
    merged = scales().models["merged"]
    share = merged.recovered["french"]
    # the scatter of 0.7 that all models share cancels; what is left is that of three times 0.01
    expected = 0.01 * np.sqrt(0.25**2 + 1 + 0.75**2) / 0.4 / np.sqrt(400)
    assert share.stderr == pytest.approx(expected, rel=0.15)
    assert around(1.5, "french").stderr > 0.03


def test_the_best_of_several_and_whether_that_is_sure() -> None:
    found = scales()
    best = found.best(["merged", "fr", "q"])
    assert best is not None
    assert (best.name, best.second) == ("merged", "fr") or best.ahead.value == pytest.approx(0, abs=1e-9)
    surely = scales(merged_french=1.0).best(["merged", "fr"])
    assert surely is not None
    assert (surely.name, surely.second, surely.sure) == ("merged", "fr", True)
    close = scales(merged_french=1.1, merged_quiz=0.4001).best(["merged", "fr"])
    assert close is not None
    assert (close.name, close.sure) == ("merged", False)
    assert found.best(["merged"]) is None


def test_the_best_single_model_may_be_the_base() -> None:
    found = scales(fr_quiz=-0.5, q_french=3.0)
    assert found.best_single[0] == "base"
    assert found.against_best_single("merged").value == pytest.approx(0.5)


def test_an_expert_that_is_not_better_is_said_and_not_divided_by() -> None:
    found = scales(q_quiz=0.4001)
    domain = found.domains["quiz"]
    assert domain.reason.startswith("q does not beat the base by two standard errors: 0.0001 ± 0.0")
    merged = found.to_json()["models"]["merged"]
    assert merged["recovered"]["quiz"] is None
    assert merged["mean"]["value"] == pytest.approx(0.75)
    assert merged["mean"]["domains"] == 1
    none = scales(q_quiz=0.4, fr_french=1.6).to_json()
    assert none["best_single"] is None
    for name in ("mean", "worst", "against_best_single"):
        assert none["models"]["merged"][name] is None


def test_a_model_without_a_figure_has_no_mean() -> None:
    found = scales(merged_quiz=None).to_json()["models"]["merged"]
    assert found["recovered"]["quiz"] is None
    assert found["recovered"]["french"]["value"] == pytest.approx(0.75)
    assert found["mean"] is None
    assert found["worst"] is None


def test_a_base_or_expert_without_a_figure() -> None:
    assert scales(base_french=None).domains["french"].reason == "the base has no figure for french"
    assert scales(fr_french=None).domains["french"].reason == "fr has no figure for french"
    assert "english" not in scales(base_english=None).models["merged"].forgotten


def test_one_item_counts_nothing() -> None:
    made = {
        model: {"french": Estimate.of_ratio([value], [1.0], "french")} for model, value in (("base", 2.0), ("fr", 1.0))
    }
    found = measure_retention(made, "base", {"french": "fr"}, {"french": "bits_per_byte"}, {"french": False})
    assert found.domains["french"].reason == "french has one item, which gives no standard error"
