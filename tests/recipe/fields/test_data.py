"""The key `data` of a recipe: what it may say, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from merganser.calibration.recipes.wanted import wanted_by
from merganser.errors import RecipeError
from merganser.recipe import load_recipe
from merganser.recipe.fields.data import DATA_KEYS
from merganser.statistics import Choice, Dataset

HEAD = "merge_method: regmean\nbase_model: base\n"
MODELS = "models: [{model: a}, {model: b}]\n"


def sources(text: str) -> list[Any]:
    return [source.data for source in load_recipe(text).models]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a.txt", (("a.txt",), Choice(), 2048)),
        ("[a.txt, b.jsonl]", (("a.txt", "b.jsonl"), Choice(), 2048)),
        ("{files: a.txt}", (("a.txt",), Choice(), 2048)),
        ("{dataset: org/set}", (Dataset("org/set"), Choice(), 2048)),
        ("{dataset: d, subset: en, split: test}", (Dataset("d", "en", "test"), Choice(), 2048)),
        (
            "{files: [a.txt], sequences: 8, length: 64, seed: 3, tokens: completions, batch_tokens: 512}",
            (("a.txt",), Choice(8, 64, 3, "completions"), 512),
        ),
    ],
)
def test_what_it_may_say(written: str, expected: tuple[Any, ...]) -> None:
    for text in (f"{HEAD}data: {written}\n{MODELS}", f"{HEAD}models: [{{model: a, data: {written}}}, {{model: b}}]\n"):
        first = sources(text)[0]
        assert (first.source, first.choice, first.batch_tokens) == expected


def test_what_is_said_for_one_model_comes_first() -> None:
    common = "data: {dataset: d, subset: en, split: test, sequences: 8, seed: 1}\n"
    models = "models:\n- {model: a, data: {sequences: 4}}\n- {model: b, data: b.txt}\n- {model: c, statistics: s}\n"
    own, other, none = sources(HEAD + common + models)
    assert (own.source, own.choice) == (Dataset("d", "en", "test"), Choice(4, None, 1))
    assert (other.source, other.choice) == (("b.txt",), Choice(8, None, 1))
    assert none is None


def test_options_for_all_need_no_files() -> None:
    models = "models:\n- {model: a, data: a.txt}\n- {model: b, data: {files: b.txt, length: 16}}\n"
    assert [own.choice for own in sources(f"{HEAD}data: {{length: 32}}\n{models}")] == [
        Choice(None, 32),
        Choice(None, 16),
    ]


ALLOWED = ", ".join(DATA_KEYS)
MALFORMED = {
    "labels of another kind": (
        "data: {files: a.txt, labels: sample}\n",
        "<recipe>:3 data.labels: 'sample' is not known. Did you mean 'sampled'? Allowed: data, sampled",
    ),
    "a number": ("data: 3\n", "<recipe>:3 data: expected a text, got 3; put it in quotes"),
    "a number in a list": ("data: [a.txt, 3]\n", "<recipe>:3 data[1]: expected a text, got 3; put it in quotes"),
    "a list of nothing": (
        "data: []\n",
        "<recipe>:3 data: the list is empty; write at least one entry, or leave the key out",
    ),
    "nothing": ("data: {}\n", "<recipe>:3 data: names no data; give files or a dataset"),
    "only empty keys": ("data: {files: }\n", "<recipe>:3 data: names no data; give files or a dataset"),
    "a blank name": ("data: ' '\n", "<recipe>:3 data: the text is empty; write a value, or leave the key out"),
    "unknown key": (
        "data: {file: a.txt}\n",
        f"<recipe>:3 data: unknown key 'file'. Did you mean 'files'? Allowed: {ALLOWED}",
    ),
    "key of the command": (
        "data: {files: a.txt, batch-tokens: 8}\n",
        f"<recipe>:3 data: unknown key 'batch-tokens'. Did you mean 'batch_tokens'? Allowed: {ALLOWED}",
    ),
    "both kinds": (
        "data: {files: a.txt, dataset: d}\n",
        "<recipe>:3 data.dataset: give files or a dataset, not both",
    ),
    "a subset of files": (
        "data: {files: a.txt, subset: en}\n",
        "<recipe>:3 data.subset: subset is for a dataset, and here are files; leave it out",
    ),
    "a split of files": (
        "data: {files: a.txt, split: test}\n",
        "<recipe>:3 data.split: split is for a dataset, and here are files; leave it out",
    ),
    "no sequence": (
        "data: {files: a.txt, sequences: 0}\n",
        "<recipe>:3 data.sequences: expected a whole number of at least 1, got 0",
    ),
    "half a sequence": (
        "data: {files: a.txt, sequences: 1.5}\n",
        "<recipe>:3 data.sequences: expected a whole number of at least 1, got 1.5",
    ),
    "many sequences": (
        "data: {files: a.txt, sequences: many}\n",
        "<recipe>:3 data.sequences: expected a whole number of at least 1, got 'many'",
    ),
    "too short": (
        "data: {files: a.txt, length: 1}\n",
        "<recipe>:3 data.length: expected a whole number of at least 2, got 1",
    ),
    "seed": (
        "data: {files: a.txt, seed: -1}\n",
        "<recipe>:3 data.seed: expected a whole number of at least 0, got -1",
    ),
    "no batch": (
        "data: {files: a.txt, batch_tokens: 0}\n",
        "<recipe>:3 data.batch_tokens: expected a whole number of at least 1, got 0",
    ),
    "which tokens": (
        "data: {files: a.txt, tokens: completion}\n",
        "<recipe>:3 data.tokens: 'completion' is not known. Did you mean 'completions'? Allowed: all, completions",
    ),
    "a dataset that is a list": (
        "data: {dataset: [a, b]}\n",
        "<recipe>:3 data.dataset: expected a text, got a list",
    ),
    "neither": (
        "data: {sequences: 4}\n",
        "<recipe>:3 data: names neither files nor a dataset; give one, here or for each model",
    ),
    "one file twice": ("data: [a.txt, a.txt]\n", "<recipe>:3 data: names a.txt twice; give each file once"),
    "a folder that is a number": (
        "data: a.txt\nkeep_statistics: 3\n",
        "<recipe>:4 keep_statistics: expected a text, got 3; put it in quotes",
    ),
    "an option beside it": (
        "data: a.txt\nsequences: 4\n",
        "<recipe>: unknown key 'sequences'. Write it in 'data'. Allowed: name, merge_method, models,",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed(kind: str) -> None:
    written, message = MALFORMED[kind]
    with pytest.raises(RecipeError) as caught:
        load_recipe(HEAD + written + MODELS)
    if "Allowed: name" in message:
        assert str(caught.value).replace("<recipe>:4", "<recipe>").startswith(message)
    else:
        assert str(caught.value) == message


OF_MODELS = {
    "statistics, too": (
        "{model: a, statistics: s, data: a.txt}",
        "<recipe>:3 models[0].data: give 'statistics' that are there, or 'data' to make them from, not both",
    ),
    "unknown key": (
        "{model: a, data: {txt: a.txt}}",
        f"<recipe>:3 models[0].data: unknown key 'txt'. Allowed: {ALLOWED}",
    ),
    "neither": (
        "{model: a, data: {length: 8}}",
        "<recipe>:3 models[0].data: names neither files nor a dataset; give one, here or for each model",
    ),
}


@pytest.mark.parametrize("kind", OF_MODELS)
def test_malformed_for_one_model(kind: str) -> None:
    written, message = OF_MODELS[kind]
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"{HEAD}models: [{written}, {{model: b}}]\n")
    assert str(caught.value) == message


def test_a_split_of_files_that_are_for_all() -> None:
    with pytest.raises(
        RecipeError, match=r"models\[0\].data: subset and split are for a dataset, and the data for all"
    ):
        load_recipe(f"{HEAD}data: a.txt\nmodels: [{{model: a, data: {{split: test}}}}, {{model: b}}]\n")


USELESS = {
    "a method without statistics": (
        "merge_method: linear\ndata: a.txt\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n",
        "<recipe>:2 data: linear uses no statistics from data; leave the key out",
    ),
    "one model of such a method": (
        "merge_method: linear\nmodels: [{model: a, data: a.txt}, {model: b}]\nparameters: {weight: 1}\n",
        "<recipe>:2 models[0].data: linear uses no statistics from data; leave the key out",
    ),
    "the base": (
        f"{HEAD}models: [{{model: base, data: a.txt}}, {{model: b, data: b.txt}}]\n",
        "<recipe>:3 models[0].data: regmean uses no statistics of the base; leave the key out",
    ),
    "every model has statistics": (
        f"{HEAD}data: a.txt\nmodels: [{{model: a, statistics: s}}, {{model: b, statistics: t}}]\n",
        "<recipe>:3 data: every model has statistics already; leave the key out",
    ),
    "nothing to keep": (
        f"{HEAD}keep_statistics: kept\nmodels: [{{model: a, statistics: s}}, {{model: b, statistics: t}}]\n",
        "<recipe>:3 keep_statistics: every model has statistics already; leave the key out",
    ),
    "nothing to keep of such a method": (
        "merge_method: linear\nkeep_statistics: k\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n",
        "<recipe>:2 keep_statistics: linear uses no statistics from data; leave the key out",
    ),
}


@pytest.mark.parametrize("kind", USELESS)
def test_data_that_no_model_needs_are_refused(kind: str) -> None:
    text, message = USELESS[kind]
    with pytest.raises(RecipeError) as caught:
        wanted_by(load_recipe(text))
    assert str(caught.value) == message


def test_what_is_wanted() -> None:
    models = "models:\n- {model: x/math, data: a.txt}\n- {model: y/math, data: a.txt}\n- {model: base}\n"
    models += "- {model: w/math, name: own, data: b.txt}\n- {model: z, statistics: s}\n"
    found = wanted_by(load_recipe(HEAD + models), taken=["math"])
    assert [(each.name, each.model, each.data.source) for each in found] == [
        ("math-2", "x/math", ("a.txt",)),
        ("math-3", "y/math", ("a.txt",)),
        ("own", "w/math", ("b.txt",)),
    ]
    assert {each.statistics for each in found} == {("gram",)}


def test_options_for_all_ask_nothing_of_models_without_text() -> None:
    """AIM takes statistics of its base alone, so the merge that it changes needs no text."""
    head = "merge_method: aim\nbase_model: base\nparameters: {omega: 0.4}\ndata: {length: 32}\n"
    recipe = load_recipe(f"{head}models: [{{model: base, data: a.txt}}, {{model: a}}]\n")
    assert [None if own.data is None else own.data.choice for own in recipe.models] == [Choice(None, 32), None]
    assert [(each.model, each.data.choice.length) for each in wanted_by(recipe)] == [("base", 32)]
