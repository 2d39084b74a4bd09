"""Recipes of fusion by training: what they mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from merganser.distillation import load_fusion
from merganser.distillation.training.recipe import Lora
from merganser.errors import NotFoundError, RecipeError

PLAIN: dict[str, Any] = {"student": "s", "sources": [{"model": "t"}], "data": "a.txt"}


def test_defaults() -> None:
    found = load_fusion(PLAIN)
    assert (found.student, found.sources[0].name, found.loss, found.choice) == ("s", "t", "cross_entropy", "min_ce")
    assert (found.lambda_, found.top, found.align, found.temperature) == (0.9, 32, "bytes", 100.0)
    assert (found.training.learning_rate, found.training.steps, found.training.batch) == (1e-5, None, 8)
    assert found.sources[0].data is not None
    assert found.sources[0].data.source == ("a.txt",)
    assert not found.from_caches
    assert (found.chunks, found.threshold) == ("finest", 0.1)
    debiased = load_fusion({**PLAIN, "loss": "alm", "chunks": "debiased", "threshold": 1e-4})
    assert (debiased.chunks, debiased.threshold) == ("debiased", 1e-4)
    lora = load_fusion({**PLAIN, "lora": 8})
    assert (lora.lora, lora.training.learning_rate) == (Lora(8, 16.0), 2e-4)
    assert load_fusion({**PLAIN, "lora": {"rank": 4, "alpha": 4}}).lora == Lora(4, 4.0)
    assert load_fusion({"student": "s", "sources": [{"cache": "a"}, {"cache": "b"}]}).from_caches


def test_each_source_may_have_data_of_its_own() -> None:
    sources = [{"model": "a", "data": "a.txt"}, {"model": "b"}]
    found = load_fusion({"student": "s", "sources": sources, "data": {"files": ["c.txt"], "length": 64}})
    assert [own.data.source for own in found.sources if own.data] == [("a.txt",), ("c.txt",)]
    # what is said for all holds for its own files, too
    assert [own.data.choice.length for own in found.sources if own.data] == [64, 64]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a typo": ({"studnet": "s"}, "unknown key 'studnet'. Did you mean 'student'? Allowed: student, sources"),
    "no student": ({"student": None}, "'student' is missing"),
    "no sources": ({"sources": []}, "sources: the list is empty; write at least one entry, or leave the key out"),
    "a merge": ({"merge_method": "ties"}, "this recipe has a merge_method; merganser merge runs it"),
    "nothing in a source": ({"sources": [{}]}, "sources[0]: give a model, or the cache of one"),
    "both in a source": ({"sources": [{"model": "a", "cache": "b"}]}, "one of the keys 'model' and 'cache'"),
    "a typo in a source": ({"sources": [{"modle": "t"}]}, "unknown key 'modle'. Did you mean 'model'?"),
    "caches and models": ({"sources": [{"model": "a"}, {"cache": "b"}]}, "names caches and models; give caches alone"),
    "caches with data": ({"sources": [{"cache": "b"}]}, "data: sources are caches, whose own texts are trained on"),
    "data of a cache": (
        {"sources": [{"cache": "b", "data": "a.txt"}]},
        "sources[0].data: the cache holds its own texts; leave data out",
    ),
    "no data": ({"data": None}, "sources[0]: a model needs data: give them here, or for all sources"),
    "a source twice": ({"sources": [{"model": "t"}, {"model": "t"}]}, "t is named twice; name each source once"),
    "labels": ({"data": {"files": "a.txt", "labels": "data"}}, "data: labels has no meaning for a fusion"),
    "a typo in data": ({"data": {"flies": "a.txt"}}, "unknown key 'flies'. Did you mean 'files'?"),
    "another loss": ({"loss": "kl"}, "'kl' is not known. Allowed: cross_entropy, alm"),
    "another choice": ({"choice": "mince"}, "'mince' is not known. Did you mean 'min_ce'?"),
    "another alignment": ({"align": "byte"}, "'byte' is not known. Did you mean 'bytes'?"),
    "chunks of tokens": ({"chunks": "finest"}, "chunks: belongs to loss: alm, and the loss is cross_entropy"),
    "tokens of chunks": ({"loss": "alm", "top": 3}, "top: belongs to loss: cross_entropy, and the loss is alm"),
    "a threshold of plain chunks": (
        {"loss": "alm", "threshold": 0.2},
        "threshold: belongs to chunks: debiased, and chunks are finest; leave it out",
    ),
    "a threshold of tokens": ({"threshold": 0.2}, "threshold: belongs to loss: alm, and the loss is cross_entropy"),
    "a threshold": (
        {"loss": "alm", "chunks": "debiased", "threshold": 2},
        "threshold: expected a number from 0 to 1, got 2",
    ),
    "lambda": ({"lambda": 1.5}, "lambda: expected a number from 0 to 1, got 1.5"),
    "lambda as text": ({"lambda": "much"}, "lambda: expected a number, got 'much'"),
    "temperature": ({"loss": "alm", "temperature": 0}, "temperature: expected a number above 0, got 0"),
    "no steps": ({"training": {"steps": 0}}, "training.steps: expected a whole number of at least 1"),
    "a typo in training": ({"training": {"learning_rat": 1}}, "Did you mean 'learning_rate'?"),
    "a batch in parts": (
        {"training": {"batch": 8, "accumulate": 3}},
        "8 sequences cannot be divided into 3 equal parts",
    ),
    "a dtype": ({"training": {"dtype": "bf16"}}, "'bf16' is not known. Did you mean 'bfloat16'?"),
    "weight decay": ({"training": {"weight_decay": -1}}, "expected a number of at least 0, got -1"),
    "no rank": ({"lora": {"alpha": 3}}, "lora: 'rank' is missing"),
    "held-out files": ({"held_out": {"a": "a.parquet"}}, "held_out: a: 'a.parquet' is not text"),
    "nothing held out": ({"held_out": {}}, "held_out: names no text"),
    "windows": ({"held_out_windows": 0}, "held_out_windows: expected a whole number of at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        load_fusion({**PLAIN, **change})
    assert message in str(caught.value)


def test_lines_are_named() -> None:
    with pytest.raises(RecipeError, match=r"<recipe>:3 sources\[0\]: unknown key 'modle'"):
        load_fusion("student: s\nsources:\n- modle: t\n")
    with pytest.raises(RecipeError, match="expected one recipe of a fusion, got 2 documents"):
        load_fusion("student: s\n---\nstudent: t\n")
    with pytest.raises(NotFoundError, match=r"nowhere\.yaml: there is no such recipe file"):
        load_fusion("nowhere.yaml")
