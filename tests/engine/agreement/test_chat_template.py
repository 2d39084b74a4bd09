"""`chat_template: auto`, and templates in the output."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merganser.engine.merge import merge, plan

FIRST, SECOND = "{{ messages[0]['content'] }} first", "{{ messages[0]['content'] }} second"


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    templates = {"a": None, "b": FIRST, "c": SECOND, "d": SECOND}
    for name, template in templates.items():
        (tmp_path / name).mkdir()
        save_file({"t": torch.ones(4)}, tmp_path / name / "model.safetensors")
        content = {} if template is None or name == "d" else {"chat_template": template}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "d" / "chat_template.jinja").write_text(SECOND)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in templates]
    return {"merge_method": "linear", "models": models, "chat_template": "auto"}


def test_auto_takes_what_most_models_have(recipe: dict, tmp_path: Path) -> None:
    result = merge(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == SECOND
    assert any("2 different ones; taken that of" in text for text in result.record["warnings"])


def test_auto_takes_the_first_of_equals(recipe: dict) -> None:
    recipe["models"] = recipe["models"][:3]
    assert plan(recipe).chat_template == FIRST


def test_auto_without_any(recipe: dict) -> None:
    recipe["models"] = recipe["models"][:1]
    planned = plan(recipe)
    assert planned.chat_template is None
    assert any("no model has a chat template" in text for text in planned.warnings)
