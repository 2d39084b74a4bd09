"""Whatever is given for a recipe: it loads, or one of our errors says why it does not."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merganser.errors import MergeError
from merganser.recipe import check_layer_ranges, check_recipe, load_recipe, load_recipes
from merganser.recipe.keys import KEYS, MODEL_KEYS, SLICE_KEYS, SOURCE_KEYS, TOKENIZER_KEYS

WILD = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).with_name("wild").glob("*.yaml"))]
WORDS = [
    *{*KEYS, *MODEL_KEYS, *SOURCE_KEYS, *SLICE_KEYS, *TOKENIZER_KEYS},
    *("path", "revision", "lora", "filter", "value", "weight", "density", "t", "normalize", "int8_mask", "<<"),
    *("ties", "slerp", "linear", "passthrough", "base", "union", "a", "a@b", "a+b", "bfloat16", "mergekit", "chatml"),
]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
keys = st.sampled_from(WORDS) | st.text(max_size=4)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5), max_leaves=12
)
# shaped like a recipe, so that the checks behind the first ones are reached
parameters = st.dictionaries(st.sampled_from(["weight", "density", "t", "normalize", "int8_mask"]), trees, max_size=3)
model = st.sampled_from(["a", "b", "c@d", {"path": "e+f"}]) | trees
source = st.fixed_dictionaries(
    {"model": model},
    optional={"parameters": parameters, "layer_range": trees | st.lists(st.integers(-1, 5), max_size=3)},
)
recipes = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["ties", "slerp", "linear", "passthrough", "della", "tis"])},
    optional={
        "models": st.lists(source, max_size=4) | trees,
        "slices": st.lists(
            st.fixed_dictionaries(
                {"sources": st.lists(source, max_size=3) | trees}, optional={"parameters": parameters}
            ),
            max_size=3,
        ),
        "base_model": model,
        "parameters": parameters,
        "compat": st.just("mergekit"),
        "modules": st.fixed_dictionaries({"default": st.fixed_dictionaries({"models": st.lists(source, max_size=3)})}),
        **dict.fromkeys(("dtype", "tokenizer", "tokenizer_source", "chat_template", "name", "random_seed"), trees),
    },
)
examples = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def load_and_check(source: Any) -> bool:
    """Return whether it is a recipe; anything but our own errors passes through."""
    try:
        recipe = load_recipe(source)
        resolver = check_recipe(recipe)
        check_layer_ranges(recipe, dict.fromkeys(recipe.references(), 3))
        for piece in range(len(resolver.slices)):
            for t in (0.0, 0.3, 1.0):
                resolver.parameters(piece, "mlp", ["mlp"] * len(resolver.sources(piece).models), t)
    except MergeError as error:
        message = str(error)
    else:
        return True
    assert message.startswith("<recipe>")
    assert len(message) < 2000
    return False


@examples
@given(recipes | st.dictionaries(keys, trees, max_size=5))
def test_mappings(value: dict[str, Any]) -> None:
    load_and_check(value)


@examples
@given(recipes | trees)
def test_yaml_says_the_same_as_the_mapping(value: Any) -> None:
    text = yaml.safe_dump(value, sort_keys=False)
    loaded = load_and_check("\n" + text)
    # "<<" merges in YAML, and a mapping of Python has no such thing
    if isinstance(value, dict) and "<<" not in text:
        assert loaded == load_and_check(value)


@examples
@given(st.text(alphabet=string.printable + "é\u2028\ud800\x00", max_size=200))
def test_texts(text: str) -> None:
    load_and_check("\n" + text)


@examples
@given(
    st.sampled_from(WILD),
    st.integers(0, 2000),
    st.integers(0, 20),
    st.text(alphabet=string.printable, max_size=6)
    | st.sampled_from(["&a ", "*a", "<<: ", "!!x ", "- ", "{", "]", "---\n"]),
)
def test_damaged_recipes(text: str, start: int, length: int, inserted: str) -> None:
    start %= len(text)
    load_and_check(f"{text[:start]}{inserted}{text[start + length :]}\n")


@examples
@given(st.binary(max_size=200))
def test_files(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_bytes(data)
    message = str(file)
    try:
        load_recipes(file)
    except MergeError as error:
        message = str(error)
    assert message.startswith(str(file))
