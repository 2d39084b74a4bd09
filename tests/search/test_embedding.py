"""The probe of the page on embedding models, run on a tiny model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.evaluation.tiny import make_model

PAGE = Path(__file__).parents[2] / "docs" / "search.md"
TEXTS = ["the cat sat on a mat", "naïve café", "run def return x = 1 ;"]


@pytest.fixture
def contrast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    model = make_model(tmp_path / "model", 1)
    found = re.search(r"^```python with-files\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None

    def run(partners: list[str]) -> float:
        lines = [json.dumps({"a": a, "b": b}) for a, b in zip(TEXTS, partners, strict=True)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        monkeypatch.setattr(sys, "argv", ["probe.py", str(model), str(tmp_path / "pairs.jsonl")])
        exec(compile(found[1], "probe.py", "exec"), {})
        return json.loads(capsys.readouterr().out.splitlines()[-1])["contrast"]

    run.model = model
    return run


def test_partners_that_are_the_same_are_found(contrast) -> None:
    assert contrast(TEXTS) < contrast(TEXTS[::-1])


def test_a_text_by_itself_has_the_same_embedding(contrast) -> None:
    """Padding does not count: the loss is that of embeddings made one by one. Partners in reverse, so that it is not 0."""
    tokenizer, model = AutoTokenizer.from_pretrained(contrast.model), AutoModel.from_pretrained(contrast.model)
    rows = []
    with torch.no_grad():
        for text in TEXTS:
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].double().mean(0)
            rows.append(hidden / hidden.norm())
    scores = torch.stack(rows) @ torch.stack(rows[::-1]).T / 0.05
    expected = (scores.logsumexp(1) - scores.diagonal()).mean().item()
    assert contrast(TEXTS[::-1]) == pytest.approx(expected, rel=1e-4)
