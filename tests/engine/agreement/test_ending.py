"""The output stops where its tokenizer and chat template end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from merganser.engine.merge import merge, plan
from tests.engine.agreement.test_vocabularies import TOKENS, linear, tokenizer
from tests.making import llama, llama_config, read_json, write_model

# ids 28 to 31
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
BASE, CHAT = 0, 1


def models(root: Path, *, generation: bool = True) -> list[Path]:
    """A base whose texts end with </s>, and a fine-tune whose turns end with <|im_end|>."""
    paths = []
    for i, (token, end) in enumerate([("</s>", 29), ("<|im_end|>", 31)]):
        settings: dict[str, Any] = {"eos_token": token}
        if i == CHAT:
            settings["chat_template"] = TEMPLATE
        files = {
            "tokenizer.json": tokenizer(TOKENS, SPECIAL),
            "tokenizer_config.json": json.dumps(settings),
            **(
                {"generation_config.json": json.dumps({"eos_token_id": end, "top_p": 0.5 + i / 4})}
                if generation
                else {}
            ),
        }
        config = {**llama_config(), "bos_token_id": [28, 30][i], "eos_token_id": end}
        paths.append(write_model(root / f"m{i}", llama(i), config, side_files=files))
    return paths


def test_nothing_changes_for_the_donors_own_tokenizer(tmp_path: Path) -> None:
    paths = models(tmp_path)
    for keys in ({}, {"tokenizer_source": "base"}, {"tokenizer_source": str(paths[BASE])}):
        planned = plan(linear(paths, **keys))
        assert (planned.generation_config, planned.config["eos_token_id"], planned.warnings) == (None, 29, [])


def test_the_configs_go_with_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    paths = models(tmp_path)
    result = merge(linear(paths, tokenizer_source=str(paths[CHAT])), tmp_path / "out")
    assert read_json(tmp_path / "out", "config.json")["eos_token_id"] == 31
    assert read_json(tmp_path / "out", "config.json")["bos_token_id"] == 30
    assert read_json(tmp_path / "out", "generation_config.json") == {"eos_token_id": 31, "top_p": 0.5}
    assert result.record["warnings"] == [
        f"config.json: goes with the tokenizer of {paths[CHAT]}: bos_token_id is 30, not 28, eos_token_id is 31, not 29"
    ]


def test_a_tokenizer_whose_model_stops_elsewhere(tmp_path: Path) -> None:
    paths = models(tmp_path)
    # as many fine-tunes are published: the tokenizer was changed and the configs were not
    for name in ("config.json", "generation_config.json"):
        content = {**read_json(paths[CHAT], name), "eos_token_id": 29}
        (paths[CHAT] / name).write_text(json.dumps(content))
    result = merge(linear(paths, tokenizer_source=str(paths[CHAT])), tmp_path / "out")
    assert read_json(tmp_path / "out", "config.json")["eos_token_id"] == 31
    assert read_json(tmp_path / "out", "generation_config.json")["eos_token_id"] == [29, 31]
    assert any("eos_token_id gets 31 ('<|im_end|>')" in warning for warning in result.record["warnings"])


@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, "chatml", "auto"])
def test_a_chat_template_whose_turns_end_with_another_token(tmp_path: Path, template: str, generation: bool) -> None:
    paths = models(tmp_path, generation=generation)
    result = merge(linear(paths, chat_template=template), tmp_path / "out")
    assert read_json(tmp_path / "out", "config.json")["eos_token_id"] == 29
    written = read_json(tmp_path / "out", "generation_config.json")
    assert written["eos_token_id"] == [29, 31]
    assert written["bos_token_id"] == 28
    assert any("eos_token_id gets 31 ('<|im_end|>')" in warning for warning in result.record["warnings"])
    assert any(entry["file"] == "generation_config.json" for entry in result.record["outputs"])


def test_a_chat_template_whose_ends_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    paths = models(tmp_path)
    planned = plan(linear(paths, chat_template="llama3"))
    assert planned.generation_config is None
    assert any("ends turns with '<|eot_id|>', which the tokenizer of" in warning for warning in planned.warnings)


def test_damaged_configs_are_said(tmp_path: Path) -> None:
    paths = models(tmp_path)
    (paths[BASE] / "generation_config.json").write_text("[")
    planned = plan(linear(paths, chat_template="chatml"))
    assert any("so whether the output stops" in warning for warning in planned.warnings)


@pytest.mark.parametrize("wrong", ['{"eos_token": {"content": 3}}', '{"eos_token": [1]}', '{"eos_token": "x"}', "{}"])
def test_settings_of_no_sense_change_nothing(tmp_path: Path, wrong: str) -> None:
    paths = models(tmp_path)
    (paths[BASE] / "tokenizer_config.json").write_text(wrong)
    (paths[BASE] / "generation_config.json").write_text('{"eos_token_id": [true, "x", 31, {}]}')
    planned = plan(linear(paths, chat_template="chatml"))
    assert planned.generation_config is None
