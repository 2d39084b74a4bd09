"""The table of plans' times: rows that were measured before stay, and all are printed as docs/speed.md shows them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan import __main__ as command

ROOT = Path(__file__).parents[2]


def test_rows_of_other_recipes_and_sizes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"planned": 2.0, "processor_seconds": 4.0, "ratio": 0.5}
    old = [{"method": name, "size": "135M", **found} for name in ("ties", "linear")]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"rows": old}))

    def measure(*_: Any) -> dict[str, float]:
        return found | {"planned": 5.0, "ratio": 1.25}

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    monkeypatch.setattr(sys, "argv", ["plan", "--methods", "ties", "--sizes", "135M", "--out", str(file)])
    assert command.main() == 1
    assert [(row["method"], row["planned"]) for row in json.loads(file.read_text())["rows"]] == [
        ("linear", 2.0),
        ("ties", 5.0),
    ]
    table = "| linear |  |  |  | 2.0 | 4.0 | 0.50 |\n| ties |  |  |  | 5.0 | 4.0 | 1.25 |\n"
    assert capsys.readouterr().out.endswith(f"| --: |\n{table}")


def test_the_document_has_the_table_of_the_results() -> None:
    rows = json.loads((ROOT / "benchmarks" / "plan" / "results.json").read_text(encoding="utf-8"))["rows"]
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    found = re.search(r"^\| recipe \| 57 M: plan .*?\n(?!\|)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    assert found[0] == command.table(rows)
