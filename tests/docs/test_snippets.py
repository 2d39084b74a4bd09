"""Every snippet of the README and the documents runs."""

import importlib.util
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merganser.cli import main
from merganser.method import MergeMethod
from merganser.method.registry import factor_method_names, get_method_for_adapters
from merganser.mixture import load_mixture
from merganser.recipe import ModelReference, Recipe, Resolver, check_recipe, load_recipes
from merganser.recipe.schema import SCHEMA_FILE, SCHEMA_ID
from merganser.search.space.space import Space
from merganser.testing import contract

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIG = '{"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": true, "vocab_size": 16}'


def snippets(language: str) -> list:
    """Find the fenced blocks of a language: page, line, text."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            name = f"{page.relative_to(ROOT).as_posix()}:{line}"
            found.append(pytest.param(match[1], id=name))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with small models and a recipe, and stand in it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (16, 8), "model.norm.weight": (8,)}
    shapes |= {f"model.layers.{i}.self_attn.q_proj.weight": (8, 8) for i in range(2)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (16, 8) for i in range(2)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for model in ("base", "math", "code"):
        target = tmp_path / "models" / model
        target.mkdir(parents=True)
        (target / "config.json").write_text(CONFIG)
        noise = 0.0 if model == "base" else 0.01
        state = {n: (t + noise * torch.randn(t.shape, generator=generator)).bfloat16() for n, t in base.items()}
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    recipe = re.search(r"^```yaml\n(# recipe\.yaml\n.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert recipe is not None
    (tmp_path / "recipe.yaml").write_text(recipe[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", snippets("yaml"))
def test_recipe(text: str) -> None:
    if "{search:" in text:
        space = Space(text)
        text = space.resolve(space.start())
    if "\nexperts:\n" in text or re.search(r"^join:$", text, re.MULTILINE):
        assert load_mixture(text)
        return
    recipes = load_recipes(text)
    assert recipes
    for recipe in recipes:
        check(recipe)


def check(recipe: Recipe) -> None:
    """Check a recipe against its method; one of adapters, which do not exist, is known by its keys or its method."""
    if recipe.merge_method in factor_method_names() or recipe.rank or recipe.space:
        with_base = replace(recipe, base_model=recipe.base_model or ModelReference("base"))
        Resolver(with_base, get_method_for_adapters(recipe.merge_method))
    else:
        check_recipe(recipe)


@pytest.mark.parametrize("text", snippets("console"))
def test_commands(text: str, folder: Path) -> None:
    commands = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "merganser"
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code


@pytest.mark.parametrize("text", snippets("python"))
def test_python(text: str, folder: Path) -> None:
    file = folder / "snippet.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("snippet", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["snippet"] = module
    try:
        spec.loader.exec_module(module)
        for value in vars(module).values():
            if isinstance(value, MergeMethod):
                for law in contract(value):
                    law(value)
    finally:
        del sys.modules["snippet"]


def test_schema_line_of_the_editor_snippet_names_the_installed_file() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    found = re.search(r"^# yaml-language-server: \$schema=(\S+)", text, re.MULTILINE)
    assert found is not None
    assert found[1] == SCHEMA_FILE.name
    assert f"`{SCHEMA_ID}`" in text


def test_examples_of_recipes_folder() -> None:
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        for recipe in load_recipes(path):
            check(recipe)
