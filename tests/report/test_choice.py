"""The page of auto: what to use, what was tried, the held-out test; every number is where it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from merganser import write_report
from merganser.report import page as page_module
from merganser.search.auto.choice import read_choice
from tests.cli.tiny import run
from tests.report.test_page import _CELL, at, figures, page
from tests.report.test_study import trial, write_study

pytest.importorskip("plotly")


def kept(mean: float, worst: float) -> dict[str, Any]:
    def figure(value: float) -> dict[str, float]:
        return {"value": value, "stderr": 0.02}

    return {
        "recovered": {
            "one": figure(2 * mean - worst),
            "two": figure(worst),
            "mean": figure(mean),
            "worst": figure(worst),
        },
        "forgotten": {"novels": figure(0.01), "mean": figure(0.01)},
    }


def tried(name: str, value: float | None, **more: Any) -> dict[str, Any]:
    figures = {} if value is None else kept(value, value - 0.2)
    found = {
        "name": name,
        "value": value,
        "figures": figures,
        "items": 8,
        "stopped": False,
        "failed": None,
        "seconds": 2.5,
    }
    return found | more


def result(recommended: str = "winner") -> dict[str, Any]:
    sign = 1 if recommended == "winner" else -1
    ends = [("winner", "winner", 0.7), ("base", "input", 0.0), ("calm", "input", 0.5), ("average", "average", 0.4)]
    return {
        "kind": "auto result",
        "format": 1,
        "objective": "recovered/mean",
        "domains": {"one": "calm", "two": "cool"},
        "tried": [
            tried("linear", 0.4),
            tried("ties", 0.3, stopped=True, items=2),
            tried("tsv_m-1", 0.6),
            tried("wudi-1", None, failed="is <b>too</b> large", items=0),
        ],
        "around": [trial(0, [0.6]), trial(1, [0.65]), trial(2, [0.65], same_as=1, items=0)],
        "winner": "trial-0002",
        "chosen_from": 5,
        "held_out": 8,
        "ends": [
            {
                "name": name,
                "role": role,
                "failed": None,
                "values": [{"value": value, "stderr": 0.02}],
                "winner_better_by": None
                if role == "winner"
                else [
                    {"value": sign * (0.7 - value), "interval": sorted(sign * (0.7 - value + e) for e in (-0.08, 0.08))}
                ],
            }
            for name, role, value in ends
        ],
        "kept": {name: kept(value, value - 0.1) for name, _, value in ends},
        "advice": None if recommended == "winner" else "Think of a sidecar.",
        "recommended": recommended,
        "merged": "out/merged" if recommended == "winner" else None,
        "notes": ["a note & more"],
    }


def test_every_number_is_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_packed_plotly", lambda _: "")
    document = result()
    text = page(write_report(write_study(tmp_path / "out", document)))
    places = set()
    for value, place, shown in _CELL.findall(text):
        assert float(value) == at(document, place), place
        if "seconds" not in place:
            assert float(re.match(r"[+-]?[\d.]+", shown)[0]) == pytest.approx(float(value), abs=5e-4)  # type: ignore[index]
        places.add(re.sub(r"\d+", "", place))
    assert {"kept.winner.recovered.mean.value", "tried[].figures.recovered.worst.value", "tried[].seconds"} <= places
    assert "ends[].winner_better_by[].value" in places
    first, history, parallel, heat = figures(text)
    # recipes from the best to the worst, those that were ended early behind
    assert [trace["y"] for trace in first["data"]] == [["tsv_m-1", "linear"], ["ties"]]
    assert first["layout"]["yaxis"]["categoryarray"] == ["ties", "linear", "tsv_m-1"]
    assert first["data"][0]["error_x"]["array"] == [0.02, 0.02]
    # the recipes come first, then the trials around the best
    points = {trace["name"]: trace for trace in history["data"]}
    assert points["scored on all items"]["x"] == [1, 3, 5, 6, 7]
    assert points["scored on all items"]["text"][0].startswith("<b>linear</b>")
    assert points["scored on all items"]["text"][3].startswith("<b>trial 2</b>")
    assert points["best so far"]["y"] == [0.4, 0.6, 0.65, 0.65]
    assert len(parallel["data"]) == 2
    assert heat["data"][0]["y"][:2] == ["trial-0001", "trial-0002"]


def test_what_it_says(tmp_path: Path) -> None:
    text = run("report", write_study(tmp_path / "out", result()), "--text").out
    text = re.sub(r"\s+", " ", text)
    assert "4 recipes and 3 trials around the best of them · auto · 14 s in merging and scoring" in text
    assert "Take the merge in " in text
    assert "out/merged: trial-0002, chosen from 5 recipes." in text.replace("/ ", "/")
    assert "one (calm), two (cool). A model alone keeps 1 of its own task." in text
    assert "Measured on 8 items that nothing was chosen on" in text
    assert "Significantly better than calm, the best single model (95 % interval)." in text
    assert "Significantly better than the average (95 % interval)." in text
    assert "winner winner 0.700 ± 0.020 0.600 ± 0.020 0.010 ± 0.020" in text
    assert "failed: is <b>too</b> large" in text
    instead = run("report", write_study(tmp_path / "out", result("calm")), "--text").out
    instead = re.sub(r"\s+", " ", instead)
    assert "Take calm as it is: trial-0002, chosen from 5 recipes, is worse, so nothing was merged." in instead
    assert "Significantly worse than calm, the best single model (95 % interval): take that instead." in instead
    assert "Think of a sidecar." in instead


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "is of a later version of merganser (format 2)"),
        ({"domains": []}, "domains: must be an object"),
        ({"tried": [{}]}, "tried[0]: has no 'name'"),
        (
            {"tried": [tried("linear", 0.5, figures={"recovered": {"mean": {}}})]},
            "figures.recovered.mean: has no 'value'",
        ),
        ({"tried": [tried("linear", float("nan"))]}, "tried[0].value: must be a finite number"),
        ({"around": [trial(0, [0.5, 0.6])]}, "trial 0 has 2 values for one objective"),
        ({"kept": {"winner": 3}}, "kept.winner: must be an object"),
        ({"chosen_from": -1}, "chosen_from: must be a whole number"),
        ({"winner": None}, "has no 'winner'"),
        ({"merged": 3}, "merged: must be a text"),
    ],
)
def test_damaged_results(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    found = run("report", write_study(tmp_path / "out", result() | change), "--text")
    assert found.code == 2, found.out
    assert message in found.err


def test_an_auto_that_was_read_back(tmp_path: Path) -> None:
    found = read_choice(write_study(tmp_path / "out", result()))
    assert [trial.number for trial in found.study.trials] == [*range(7)]
    assert found.study.trials[6].same_as == 5
    assert found.study.front == (5,)
    assert (
        json.loads((tmp_path / "out" / "result.json").read_text())["kept"]["calm"]["forgotten"]["mean"]["value"] == 0.01
    )
