"""Published methods that no recipe can name: each has an answer of its own, and its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from merganser.catalogue import ELSEWHERE, Elsewhere, canonical_name, factor_names, own_names, unknown_method
from merganser.mixture.shrinking.methods import METHODS
from merganser.runtime import LAYERS
from merganser.search.samplers import OWN
from tests.cli.tiny import linear, recipe, run

DOCS = Path(__file__).parents[2] / "docs"
NAMES = [name for each in ELSEWHERE for name in each.names]


def test_no_method_and_no_name_twice() -> None:
    plain = [re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p")) for name in NAMES]
    assert sorted(set(plain)) == sorted(plain)
    assert not {canonical_name(name) for name in NAMES} & (own_names() | factor_names())


@pytest.mark.parametrize("own", ELSEWHERE, ids=lambda own: own.names[0])
def test_what_is_said(own: Elsewhere) -> None:
    for name in own.names:
        assert own.says in unknown_method(name)
    if own.page:
        page, _, anchor = own.page.partition("#")
        text = (DOCS / page).read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert not anchor or anchor in [title.lower().replace(" ", "-") for title in titles]
    # what looks like a method is one
    known = own_names() | factor_names() | {"base_model", "gate_mode", "merge_method", "combination_type"}
    words = {word for code in re.findall(r"`(.*?)`", own.says) for word in re.findall(r"\w+_\w+", code)}
    assert words <= known | set(METHODS) | set(LAYERS)


def test_commands_name_what_there_is() -> None:
    said = " ".join(own.says for own in ELSEWHERE)
    assert set(re.findall(r"shrink --method (\w+)", said)) == set(METHODS)
    assert set(re.findall(r"--sampler (\w+)", said)) <= {*OWN, "cma"}


@pytest.mark.parametrize("name", ["reap", "REAP", "Re_ap"])
def test_a_recipe_is_told_where_it_is(models: Path, name: str) -> None:
    found = run("plan", recipe(models / "recipe.yaml", linear("a", "b", merge_method=name)))
    assert found.code == 2
    assert re.fullmatch(
        rf"error: \S*recipe\.yaml:\d+ merge_method: '{name}' is not a merge method of recipes: `merganser shrink --method reap` "
        r"makes mixtures smaller\. See docs/shrinking\.md\n",
        found.err,
    )
    assert run("methods", name).err == found.err.replace(found.err.split("'")[0], "error: ")


def test_why_it_is_not_here() -> None:
    found = run("methods", "defense-aware")
    assert (found.code, found.out) == (2, "")
    assert "no form for text was found" in found.err
    assert "docs/" not in found.err
