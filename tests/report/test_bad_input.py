"""What cannot be drawn is said in one message; nothing is written."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tiny import run
from tests.report.conftest import merged
from tests.report.making import evaluation, write_evaluation


def refused(*arguments: object) -> str:
    before = sorted(Path().rglob("*"))
    found = run("report", *arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: ")
    assert "Traceback" not in found.err
    assert sorted(Path().rglob("*")) == before
    return found.err.removeprefix("error: ").removesuffix("\n")


def test_no_merge(models: Path) -> None:
    assert refused("nothing") == "nothing: no such folder"
    assert refused("base") == "base: has no merge.json; a report is drawn of what merganser merged"
    assert refused("base/config.json") == "base/config.json: is not a folder"


DAMAGED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (
        lambda r: r.update(format=99),
        "is of format 99, and this version of merganser reads up to 1; install a later one",
    ),
    (lambda r: r.update(format="1"), "format: must be a whole number, found '1'"),
    (lambda r: r.pop("recipe"), "has no 'recipe', which every such file has; is it complete?"),
    (lambda r: r.update(layers={}), "layers: must be a list, found {}"),
    (lambda r: r["layers"].insert(0, 7), "layers[0]: must be an object, found 7"),
    (lambda r: r["layers"][0].update(models="x"), "layers[0].models: must be a list, found 'x'"),
    (lambda r: r["layers"][0]["models"].append("x"), "layers[0].models[3]: must be a finite number, found 'x'"),
    (lambda r: r["layers"][0].update(merged=True), "layers[0].merged: must be a finite number, found True"),
    (lambda r: r["layers"][0].update(layer=-1), "layers[0].layer: must be a whole number, found -1"),
    (
        lambda r: r["layers"][0]["cosines"].pop(),
        "layers[0].cosines: must be a list of 3 values, one for each two models, found [",
    ),
    (lambda r: r["movement"]["inputs"].pop(), "movement.inputs: must be 4 names, a base and 3 models, found ["),
    (
        lambda r: r["outputs"][1].pop("sha256"),
        "outputs[1]: has no 'sha256', which every such file has; is it complete?",
    ),
    (lambda r: r.update(compiled=0), "compiled: must be true or false, found 0"),
    (lambda r: r["warnings"].append(None), "warnings[0]: must be a text, found None"),
    (lambda r: r["timings"].update(seconds=float("inf")), "timings.seconds: must be a finite number, found inf"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_a_damaged_record(out: Path, damage: Callable[[dict[str, Any]], object], message: str) -> None:
    file = out / "merge.json"
    record = json.loads(file.read_text())
    damage(record)
    file.write_text(json.dumps(record))
    for more in ((), ("--text",)):
        assert refused("out", *more).startswith(f"out/merge.json: {message}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"format": 1', "{}"])
def test_no_json(out: Path, text: str) -> None:
    (out / "merge.json").write_bytes(text.encode("latin-1"))
    assert refused("out").startswith("out/merge.json: ")


def test_the_page_exists(out: Path) -> None:
    pytest.importorskip("plotly")
    assert run("report", "out").code == 0
    assert refused("out") == ("out/report.html: exists; choose another file with --out, or replace it with --overwrite")
    assert run("report", "out", "--overwrite").code == 0
    assert run("report", "out", "--out", "elsewhere.html").code == 0
    assert refused("out", "--out", "base").startswith("base: is a folder; name a file, such as base/report.html")
    assert refused("out", "--out", "no/where.html") == "no/where.html: cannot be written: no such file or directory"
    Path("dangling.html").symlink_to("nowhere")
    assert refused("out", "--out", "dangling.html").startswith("dangling.html: exists; ")
    assert refused("out", "--out", "dangling.html", "--overwrite").startswith(
        "dangling.html: exists and is not a page "
    )
    assert Path("dangling.html").is_symlink()


def test_a_full_disk_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")

    def fail(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert refused("out") == "out/report.html: cannot be written: no space left on device"


def test_without_plotly(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert refused("out") == (
        "report: figures need plotly, which is not installed; pip install 'merganser[report]', "
        "or print the report with --text"
    )
    assert run("report", "out", "--text").code == 0


BAD_EVALUATIONS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda e: e.update(kind="recipe"), "is not an evaluation; give the file that merganser eval --json wrote"),
    (lambda e: e.clear(), "is not an evaluation; give the file that merganser eval --json wrote"),
    (lambda e: e.update(format=2), "is of format 2, and this version of merganser reads up to 1; install a later one"),
    (lambda e: e.pop("tasks"), "has no 'tasks', which every such file has; is it complete?"),
    (
        lambda e: e["results"]["base"]["french"]["metrics"]["bits_per_byte"].update(value="1"),
        "results.base.french.metrics.bits_per_byte.value: must be a finite number, found '1'",
    ),
    (lambda e: e["retention"]["models"].update(x=3), "retention.models.x: must be an object, found 3"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_EVALUATIONS)
def test_a_damaged_evaluation(out: Path, damage: Callable[[dict[str, Any]], object], message: str) -> None:
    found = evaluation(out)
    damage(found)
    write_evaluation(out.parent / "eval.json", found)
    assert refused("out", "--eval", "eval.json") == f"eval.json: {message}"


def test_no_evaluation(out: Path) -> None:
    assert refused("out", "--eval", "none.json") == "none.json: no such file"
    assert refused("out", "--eval", "out") == "out: cannot be read: is a folder, where a regular file is needed"


def test_spectra_need_task_vectors_and_the_models(out: Path) -> None:
    merged(out.parent, "linear", None, "linear")
    said = "singular values are those of task vectors, and its run record names no base with models that every tensor"
    assert refused("linear", "--spectra").startswith(f"linear: {said} was merged from")
    (out.parent / "two").rename(out.parent / "moved")
    assert refused("out", "--spectra").startswith("model 'two' not found")
