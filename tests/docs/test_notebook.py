"""Every cell of the notebook runs, one after the other, as in a kernel."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

DOCS = Path(__file__).resolve().parents[2] / "docs"
NOTEBOOK = DOCS / "notebook.ipynb"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "math", "code"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(16, 8, generator=generator) for i in range(2)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; return what its last line gives, as a notebook shows it."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


def test_every_cell_runs(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    # outputs would be of one machine, and change with every run
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    names: dict[str, Any] = {"__name__": "notebook"}
    shown = [run_cell(source, names) for source in sources]
    tables = [each._repr_html_() for each in shown if hasattr(each, "_repr_html_")]
    assert len(tables) == 2
    assert all("ties" in table and len(table) < 10_000 for table in tables)
    assert re.search(r"Did you mean 'threads'\?", capsys.readouterr().out)
    torch.testing.assert_close(shown[-1], torch.full((2, 3), 2.5))


def test_a_cell_that_fails_is_seen() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cell("a = 1\na / 0", {})


def test_the_documents_link_it() -> None:
    assert "(docs/notebook.ipynb)" in (DOCS.parent / "README.md").read_text(encoding="utf-8")
