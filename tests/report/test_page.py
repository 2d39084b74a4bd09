"""The page: every number is where it says, nothing is loaded, and no name is taken for markup."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser import write_report
from merganser.report.page import _packed
from tests.cli.tiny import recipe, run, state, write
from tests.report.conftest import merged, moved
from tests.report.making import evaluation, write_evaluation

pytest.importorskip("plotly")

_CELL = re.compile(r'<td[^>]*title="([^" ]+)(?: \(([^"]+)\))?"[^>]*>([^<]*)</td>')
_PACKED = re.compile(r'<script type="text/plain" id="(\w+)">(.*?)</script>', re.DOTALL)


def page(file: Path) -> str:
    """The page without plotly."""
    return re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", file.read_text(encoding="utf-8"))


def unpacked(text: str, name: str) -> str:
    """A text of the page that is deflated, as `page.py` says."""
    packed = dict(_PACKED.findall(text))[name]
    assert not set(packed) & set("<&")
    return zlib.decompress(base64.b85decode(packed.translate({ord(","): "<", ord("."): "&"}))).decode()


def figures(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(unpacked(text, "figures"))
    return found


def at(document: Any, place: str) -> Any:
    for step in re.findall(r"\w[\w -]*|\[\d+\]", place):
        document = document[int(step[1:-1]) if step.startswith("[") else step]
    return document


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_every_number_is_where_it_says(out: Path) -> None:
    record = json.loads((out / "merge.json").read_text())
    measured = evaluation(out)
    write_evaluation(out.parent / "eval.json", measured)
    text = page(write_report(out, evaluation="eval.json"))
    cells = _CELL.findall(text)
    places = set()
    for value, place, shown in cells:
        if "[]" in place:  # a sum over files of one model
            continue
        found = at(measured if place.startswith(("results", "retention", "differences")) else record, place)
        assert float(value) == (found["value"] if isinstance(found, dict) else found), place
        first = re.match(r"-?[\d.,e-]+", shown)
        assert first is not None, shown
        digits = Decimal(first[0].replace(",", ""))
        last = 10.0 ** int(digits.as_tuple().exponent)
        scale = 100 if "%" in shown else 1
        assert float(digits) == pytest.approx(scale * float(value), rel=1e-9, abs=0.501 * last), place
        places.add(re.sub(r"\d+", "", place))
    assert places >= {
        "layers[].models[]",
        "layers[].merged",
        "movement.total.models[]",
        "movement.total.merged",
        "movement.total.cosines[]",
        "movement.total.sign_conflicts[]",
        "outputs[].bytes",
        "inputs[].bytes",
        "timings.seconds",
        "results.base.english.metrics.accuracy",
        "retention.models.merge-.mean",
        "differences.models.merge-.french",
    }
    assert {place for _, place, _ in cells} >= {f"inputs[{i}].bytes" for i in range(4)}
    # no number that was shown lacks a place
    assert all(place for _, place, _ in cells)


def test_figures_draw_the_record_and_nothing_else(out: Path) -> None:
    record = json.loads((out / "merge.json").read_text())
    measured = evaluation(out)
    write_evaluation(out.parent / "eval.json", measured)
    kept, recovered, heatmap, related = figures(page(write_report(out, evaluation="eval.json")))
    layers = {(entry["layer"], entry["role"]): entry for entry in record["layers"]}
    assert len(heatmap["data"]) == 4
    for k, strip in enumerate(heatmap["data"]):
        for role, row, texts in zip(strip["y"], strip["z"], strip["text"], strict=True):
            for layer, value, text in zip(strip["x"], row, texts, strict=True):
                entry = layers[layer, role]
                assert value == [*entry["models"], entry["merged"]][k]
                assert text.startswith(f"<b>layer {layer} · {role}: {value:.3g}</b>")
                assert text.count("<br>") == 1 + entry["tensors"]
    assert {note["text"] for note in heatmap["layout"]["annotations"]} == {"one", "two", "three", "merge"}
    for line in related["data"]:
        key = "sign_conflict" if line.get("yaxis") == "y2" else "cosine"
        assert line["y"] == [layers[layer, line["name"]][key] for layer in line["x"]]
    found = set(numbers(measured))
    for figure in (kept, recovered):
        for trace in figure["data"]:
            drawn = [*trace["y"], *(x for x in trace["x"] if isinstance(x, float)), *trace["error_y"]["array"]]
            assert set(drawn) <= found
    assert len(kept["data"]) == len(recovered["data"]) == 3
    for mark, model in zip(kept["data"], measured["retention"]["models"].values(), strict=True):
        assert (mark["x"], mark["y"]) == ([model["mean_forgotten"]["value"]], [model["mean"]["value"]])


def test_tensors_stand_beside_the_cell_they_are_in(out: Path) -> None:
    record = json.loads((out / "merge.json").read_text())
    heatmap = figures(page(write_report(out)))[0]
    strip = heatmap["data"][1]
    text = strip["text"][strip["y"].index("mlp")][1]
    entries = {t["name"]: t for t in record["movement"]["tensors"] if (t["layer"], t["role"]) == (1, "mlp")}
    lines = text.split("<br>")[2:]
    expected = sorted(((t["models"][1], name) for name, t in entries.items()), reverse=True)
    assert lines == [f"{value:.3g}  {name.partition('.1.')[2]}" for value, name in expected]


def test_nothing_is_loaded_from_elsewhere(out: Path) -> None:
    text = page(write_report(out))
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:|//|[\w./]+\.(js|css|png))", text)
    assert "<link" not in text
    assert "<script src" not in text
    assert text.count("<html") == text.count("</html>") == 1


def test_no_name_is_taken_for_markup(models: Path) -> None:
    evil = "</script><script>alert(1)<b>&amp;\"'"
    name = evil.replace("/", "_")
    write(models / name, moved(4, 0.01))
    document = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in (f"./{name}", "one")],
        "name": evil,
    }
    assert run("merge", recipe(models / "r.yaml", document), "<i>out", "--quiet").code == 0
    measured = evaluation(models / "<i>out", (evil, "other"))
    measured["warnings"] = [evil]
    measured["models"]["base"]["failed"] = evil
    write_evaluation(models / "eval.json", measured)
    text = page(write_report("<i>out", evaluation="eval.json"))
    assert "<i>out" not in text
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "<b>&amp;" not in text.replace("&lt;b&gt;&amp;amp;", "")
    assert name in html.unescape(text)
    assert _packed("n", evil).count("<") == 2
    # in figures plotly would read markup
    for figure in figures(text):
        assert "<script" not in json.dumps(figure)


def test_every_kind_of_merge_is_drawn(models: Path) -> None:
    linear = page(write_report(merged(models, "linear", None, "linear")))
    assert "from the first model (one)" in linear
    assert "The merge has no base, so there are no task vectors." in linear
    pieces = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in ("two", "one", "one")]
    document = {"merge_method": "passthrough", "slices": pieces}
    assert run("merge", recipe(models / "s.yaml", document), "slices", "--quiet").code == 0
    slices = page(write_report("slices"))
    assert "<td>0</td><td>two</td>" in slices
    assert "<td>1 to 2</td><td>one</td>" in slices
    write(models / "still", state(0, dtype=torch.float32))
    listed = [{"model": "still", "parameters": {"weight": 1.0}}]
    document = {"merge_method": "task_arithmetic", "base_model": "base", "models": listed}
    assert run("merge", recipe(models / "z.yaml", document), "zero", "--quiet").code == 0
    zero = page(write_report("zero"))
    assert "There is one task vector alone." in zero
    assert figures(zero)[0]["layout"]["coloraxis"]["cmax"] == 1


def test_a_record_of_an_earlier_version(out: Path) -> None:
    file = out / "merge.json"
    record = json.loads(file.read_text())
    del record["movement"]
    for entry in record["layers"]:
        for key in ("cosine", "sign_conflict", "cosines", "sign_conflicts"):
            entry.pop(key, None)
    file.write_text(json.dumps(record))
    text = page(write_report(out))
    assert "This record is of an earlier version of merganser: it names no tensors and no task vectors." in text
    assert next(note["text"] for note in figures(text)[0]["layout"]["annotations"]) == "input 2"


def test_what_was_not_finite_has_no_numbers(models: Path) -> None:
    broken = moved(5, 0.01)
    broken["model.norm.weight"][0] = torch.nan
    write(models / "one", broken)
    document = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("one", "two")],
    }
    assert run("merge", recipe(models / "r.yaml", document), "out", "--quiet", "--allow-nonfinite").code == 0
    text = page(write_report("out"))
    assert "NaN" not in text
    assert "No two task vectors have a direction to compare." in text


def test_many_models_and_long_names(models: Path) -> None:
    names = [f"a-model-with-a-name-that-goes-on-and-on-and-on-{i}" for i in range(8)]
    for i, name in enumerate(names):
        write(models / name, moved(i + 10, 0.01))
    document = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 0.1}} for m in names],
    }
    assert run("merge", recipe(models / "r.yaml", document), "out", "--quiet").code == 0
    heatmap = figures(page(write_report("out")))[0]
    assert len(heatmap["data"]) == 9
    labels = [note["text"] for note in heatmap["layout"]["annotations"]]
    assert all(len(label) <= 36 for label in labels)
    assert len(set(labels)) == 9
    # strips do not overlap
    domains = [heatmap["layout"][f"yaxis{k}" if k > 1 else "yaxis"]["domain"] for k in range(1, 10)]
    assert all(upper[0] > lower[1] for upper, lower in pairwise(domains))
    # above each there is room for its name
    assert domains[0][1] < 1
    assert domains[-1][0] == pytest.approx(0, abs=1e-9)


def test_very_many_tensors(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merganser.report.movement._MOST_ROWS", 5)
    record = json.loads((out / "merge.json").read_text())
    most = sorted(record["movement"]["tensors"], key=lambda t: -t["merged"])[:5]
    table = (
        page(write_report(out))
        .partition("by tensor: the 5 of 19 that the merge moved most")[2]
        .partition("</table>")[0]
    )
    assert re.findall(r"<td[^>]*>(model\.[\w.]+|lm_head[\w.]+)</td>", table) == [t["name"] for t in most]


def test_who_merged_what(out: Path) -> None:
    file = out / "merge.json"
    record = json.loads(file.read_text())
    assert "merged by" not in page(write_report(out))
    file.write_text(json.dumps(record | {"methods": {"tsv_m": 12, "task_arithmetic": 7}}))
    text = page(write_report(out, overwrite=True))
    assert '<td>tsv_m</td><td class="n" title="12 (methods.tsv_m)">12</td>' in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_figure(out: Path) -> None:
    write_evaluation(out.parent / "eval.json", evaluation(out))
    file = write_report(out, evaluation="eval.json", spectra=True)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={out.parent / 'browser'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=20000", "--dump-dom", f"file://{file.resolve()}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.count('class="plot js-plotly-plot"') == len(figures(page(file))) == 5


def test_the_verdict_comes_first(out: Path) -> None:
    measured = evaluation(out, merges=2)
    measured["models"]["merge-2"]["reference"] = str(merged(out.parent, "linear", None, "mean"))
    write_evaluation(out.parent / "eval.json", measured)
    text = page(write_report(out, evaluation="eval.json"))
    first = text.partition("<nav>")[0]
    assert "Kept 36.0 ± 2.0 % of what the experts gained, on average over their domains; the least on maths" in first
    assert "It forgot 1.2% on tasks without an expert. It keeps less than the best single model." in first
    assert "The plain average keeps more: 44.0 ± 2.0 %." in first
    rows = re.findall(r"<tr><td[^>]*>(this merge|average \(merge-2\)|best single model \(expert-french\))</td>", first)
    assert len(rows) == 3
    kept = measured["retention"]["models"]["merge-1"]
    kept["against_best_single"] = {"value": 0.03, "stderr": 0.02}
    kept["mean_forgotten"] = {"value": -0.02, "stderr": 0.02}
    write_evaluation(out.parent / "eval.json", measured)
    first = page(write_report(out, evaluation="eval.json", overwrite=True)).partition("<nav>")[0]
    assert "It gained 2.0% on tasks without an expert. Whether it keeps more" in first
    assert "is not sure" in first


def test_one_outlier_does_not_flatten_a_chart(out: Path) -> None:
    file = out / "merge.json"
    record = json.loads(file.read_text())
    inside = [entry for entry in record["layers"] if entry["layer"] is not None]
    for i in range(80):  # a model of many layers
        record["layers"].append({**inside[0], "layer": 10 + i, "models": [0.1, 0.2, 0.3], "merged": 0.2})
    inside[0]["models"][0] = 50.0
    file.write_text(json.dumps(record))
    measured = evaluation(out, merges=3)
    measured["retention"]["models"]["merge-3"]["mean"]["value"] = -400.0
    write_evaluation(out.parent / "eval.json", measured)
    text = page(write_report(out, evaluation="eval.json"))
    kept, _, heatmap, _ = figures(text)
    assert heatmap["layout"]["coloraxis"]["cmax"] == 0.3
    assert "the scale ends at 0.3; 1 value above it" in text
    assert kept["layout"]["yaxis"]["range"][0] > -1
    assert "outside the chart: merge-3" in text
    assert max(trace["y"][0] for trace in kept["data"]) < kept["layout"]["yaxis"]["range"][1]


def test_ticks_differ(out: Path) -> None:
    from merganser.report.palette import bounds, percent_ticks

    assert [percent_ticks([0.49, 0.49 + width]) for width in (0.2, 0.02, 0.002)] == [".0%", ".1%", ".2%"]
    assert bounds([0.1, 0.2, 0.3, 0.4]) is None
    assert bounds([0.1, 0.1, 0.1, 0.1]) is None


def test_no_path_of_the_home_folder(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = out.parent
    listed = [{"model": str(models / m), "parameters": {"weight": 0.5}} for m in ("one", "two")]
    document = {"merge_method": "task_arithmetic", "base_model": str(models / "base"), "models": listed}
    assert run("merge", recipe(models / "r.yaml", document), "named", "--quiet").code == 0
    monkeypatch.setattr(Path, "home", lambda: models.parent)
    text = page(write_report(models / "named"))
    assert str(models.parent) not in text + unpacked(text, "figures")
    assert f"~/{models.name}/base" in text
