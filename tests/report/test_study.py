"""The page of a search: every number is where it says, figures draw the result, and damaged results are refused."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merganser import write_report
from merganser.errors import CheckpointError, MergeError
from merganser.evaluation.scoring.journal import SharedJournal
from merganser.report import page as page_module
from merganser.search.stored import read_items, read_study
from tests.cli.tiny import run
from tests.report.test_page import _CELL, at, figures, page

pytest.importorskip("plotly")


def trial(number: int, values: list[float] | None, **more: Any) -> dict[str, Any]:
    settings = {
        "parameters.weight[a]": 0.1 * number,
        "parameters.weight[b]": 1.0 - 0.1 * number,
        "merge_method": "ties",
    }
    found = {
        "number": number,
        "settings": settings,
        "values": values,
        "stderr": [0.01] * len(values or ()),
        "feasible": True,
        "items": 8,
        "stopped": False,
        "same_as": None,
        "failed": None,
        "seconds": 1.5,
        "recipe": f"trial-{number + 1:04d}",
    }
    return found | more


def result(objectives: int = 1) -> dict[str, Any]:
    def values(*given: float) -> list[float]:
        return [*given, *(1.0 - v for v in given)][:objectives]

    trials = [
        trial(0, values(0.5)),
        trial(1, values(0.4), stopped=True, items=2),
        trial(2, values(0.7)),
        trial(3, None, failed="the command <b>printed</b> nothing", items=0),
        trial(4, values(0.9), feasible=False),
        trial(5, values(0.5), same_as=0, items=0),
    ]
    ends = [
        ("trial-0003", "winner", 0.6),
        ("base", "input", 0.3),
        ("expert", "input", 0.55),
        ("average", "average", 0.5),
    ]
    return {
        "kind": "search result",
        "format": 1,
        "objectives": [
            {"objective": "quiz/accuracy", "direction": "maximize"},
            {"objective": "loss", "direction": "minimize"},
        ][:objectives],
        "sampler": "tpe",
        "trials": trials,
        "front": [2],
        "held_out": 8,
        "ends": [
            {
                "name": name,
                "role": role,
                "failed": None,
                "values": [{"value": v, "stderr": 0.02} for v in values(value)],
                "winner_better_by": None
                if role == "winner"
                else [{"value": v, "interval": [v - 0.08, v + 0.08]} for v in values(0.6 - value)],
            }
            for name, role, value in ends
        ],
        "importance": {"quiz/accuracy": {"parameters.weight[a]": 0.75, "parameters.weight[b]": 0.25}},
        "notes": ["a note & more"],
    }


def write_study(folder: Path, found: dict[str, Any], tasks: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "search.json").write_text('{"kind": "search", "format": 1}')
    (folder / "result.json").write_text(json.dumps(found))
    (folder / "items.jsonl").unlink(missing_ok=True)
    with SharedJournal(folder / "items.jsonl") as journal:
        for k in range(tasks):
            for i, name in enumerate(["base", "trial-0001", "trial-0002", "trial-0003"]):
                columns = {"correct": [i > 0, i > 1, False, True]}
                if k == 1:
                    columns |= {"bits": [8 - i, 4, 4, 2], "bytes": [1, 2, 4, 0]}
                journal.add(f"k{i}/t{k}", 0, {"items": [5, 1, 3, 2], "columns": columns}, model=name, task=f"t{k}")
                if name != "trial-0002":
                    more = {"correct": [True]} if k == 0 else {"correct": [True], "bits": [1], "bytes": [2]}
                    journal.add(f"k{i}/t{k}", 1, {"items": [4], "columns": more}, model=name, task=f"t{k}")
            journal.add(f"k0/t{k}", -1, {"items": [9], "columns": {"correct": [True]}}, model="base", task=f"t{k}")
    return folder


def test_every_number_is_where_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_packed_plotly", lambda _: "")
    document = result()
    text = page(write_report(write_study(tmp_path / "study", document)))
    places = set()
    for value, place, shown in _CELL.findall(text):
        assert float(value) == at(document, place), place
        assert float(re.match(r"[+-]?[\d.]+", shown)[0]) == pytest.approx(float(value), abs=5e-5)  # type: ignore[index]
        places.add(re.sub(r"\d+", "", place))
    assert places == {"ends[].values[].value", "ends[].winner_better_by[].value"}
    said = html.unescape(text)
    for sentence in (
        "The best is trial 3, of 4 that were scored; as the best of many, it looks better on the items that chose it than it is.",
        "Measured on 8 items that no trial saw; ± is one standard error.",
        "No significant difference from expert, the best single model: the 95 % interval contains zero.",
        "Significantly better than the average (95 % interval).",
        f"merganser merge {tmp_path}/study/winner.yaml OUT",
        "a note & more",
        "trial 4: the command <b>printed</b> nothing",
    ):
        assert sentence in said
    assert "<b>printed" not in text
    history, parallel, importance, heat = figures(text)
    marks = {trace["name"]: (trace["x"], trace["y"]) for trace in history["data"]}
    assert marks == {
        "scored on all items": ([1, 3, 6], [0.5, 0.7, 0.5]),
        "ended early": ([2], [0.4]),
        "misses a bound": ([5], [0.9]),
        "best so far": ([1, 3, 6], [0.5, 0.7, 0.7]),
    }
    # from the worst to the best, which is drawn last and in another colour
    assert [trace["y"][0] for trace in parallel["data"]] == pytest.approx([0.5, 0.0, 1.0])
    assert parallel["data"][-1]["line"] == {"color": "#EE6677", "width": 3}
    assert parallel["data"][0]["y"][2] == 0.5
    assert importance["data"][0]["x"] == [0.25, 0.75]
    # columns from hard to easy: item 3 is right for nobody, 4 for all; rows are trials, then models
    (found,) = heat["data"]
    assert found["y"] == ["trial-0001", "trial-0002", "trial-0003", "base"]
    z = np.array(found["z"], float)
    assert [int(re.search(r"items (\d)", name)[1]) for name in found["x"]] == [3, 1, 5, 2, 4]  # type: ignore[index]
    assert z[:, 0].tolist() == [0, 0, 0, 0]
    assert [np.sign(v) for v in z[:, 1]] == [-1, 1, 1, -1]
    assert [np.sign(v) for v in z[:, 2]] == [1, 1, 1, -1]
    assert np.isnan(z[1, 4])
    assert not np.isnan(z[0, 4])


def test_several_objectives_and_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_packed_plotly", lambda _: "")
    folder = write_study(tmp_path / "study", result(2), tasks=2)
    first, second, front, _, _, _, heat = figures(page(write_report(folder)))
    assert first["data"][0]["y"] == [0.5, 0.7, 0.5]
    assert second["data"][0]["y"] == pytest.approx([0.5, 0.3, 0.5])
    assert [trace["name"] for trace in front["data"]] == ["front", "others"]
    assert (front["data"][0]["x"], front["data"][0]["y"]) == ([0.7], [pytest.approx(0.3)])
    assert heat["data"][0]["y"][0] == "trial-0001"
    (own,) = [each for each in read_items(folder) if each.task == "t1"]
    assert own.score == "bits per byte"
    assert own.scores[own.models.index("base")].tolist() == [-2.0, -2.0, -1.0, -0.5, -8.0]


def test_a_search_without_an_end(tmp_path: Path) -> None:
    found = result() | {"ends": []}
    assert (
        "stopped before the held-out test: nothing was measured"
        in run("report", write_study(tmp_path / "s", found), "--text").out
    )
    found |= {"front": [], "trials": []}
    del found["importance"]
    text = run("report", write_study(tmp_path / "s", found), "--text").out
    assert "No trial has figures on all items and keeps the bounds, so nothing was found." in text


def test_in_the_terminal(tmp_path: Path) -> None:
    text = run("report", write_study(tmp_path / "s", result(2)), "--text").out
    assert "6 trials · tpe · quiz/accuracy (higher is better), loss (lower is better)" in text
    assert "parameters.weight[a]: 75% ██████████████████████████████" in text
    assert "items that tell trials apart most:" in text


def test_a_large_search_stays_below_two_megabytes(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    found = result()
    found["trials"] = [trial(i, [float(chance.random())]) for i in range(240)]
    for each in found["trials"]:
        each["settings"] = {f"parameters.weight[model-{k}][{k}/9]": float(chance.random()) for k in range(24)}
    folder = write_study(tmp_path / "study", found)
    with SharedJournal(folder / "items.jsonl") as journal:
        for task in ("p", "q"):
            for i in range(240):
                correct = (chance.random(300) < 0.5).tolist()
                journal.add(f"t{i}/{task}", 0, {"items": [*range(300)], "columns": {"correct": correct}}, model=f"trial-{i + 1:04d}", task=task)  # fmt: skip
    assert write_report(folder).stat().st_size < 2_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other result"}, "is of the kind 'other result'; merganser search writes 'search result'"),
        ({"kind": 3}, "kind: must be a text, found 3"),
        ({"format": 2}, "is of a later version of merganser (format 2)"),
        ({"objectives": {}}, "objectives: must be a list"),
        ({"trials": [{}]}, "trials[0]: has no 'number'"),
        ({"trials": [trial(0, [0.5, 0.6])], "front": [0]}, "trial 0 has 2 values for 1 objectives"),
        ({"trials": [trial(0, [float("nan")])]}, "trials[0].values[0]: must be a finite number"),
        ({"trials": [trial(0, [0.5], stopped="no")]}, "trials[0].stopped: must be true or false"),
        ({"front": [17]}, "front: there is no trial 17"),
        ({"held_out": -1}, "held_out: must be a whole number"),
        ({"ends": [{"name": "a", "role": "input", "values": [{}]}]}, "ends[0].values[0]: has no 'value'"),
        ({"ends": [{"name": "a", "role": "input", "winner_better_by": [{"value": 1, "interval": [1]}]}]}, "interval: must be two numbers"),
        ({"importance": {"a": 1}}, "importance.a: must be an object"),
        ({"notes": None}, "has no 'notes'"),
    ],
)  # fmt: skip
def test_damaged_results(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_study(tmp_path / "study", result() | change)
    found = run("report", folder, "--text")
    assert found.code == 2, found.out
    assert message in found.err


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_packed_plotly", lambda _: "")
    folder = write_study(tmp_path / "study", result())
    for option in (("--eval", "x.json"), ("--spectra",)):
        found = run("report", folder, *option)
        assert (found.code, "is for the report of a merge, and this is the folder of a search" in found.err) == (
            2,
            True,
        )
    assert run("report", folder).code == 0
    assert "exists; choose another file" in run("report", folder).err
    (folder / "report.html").write_text("mine")
    with pytest.raises(MergeError, match="exists and is not a page by merganser"):
        write_report(folder, overwrite=True)
    (folder / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_study(folder)
    (folder / "result.json").unlink()
    with pytest.raises(MergeError, match="stopped before it found something"):
        read_study(folder)
