"""What a researcher meets in Python and in notebooks: misspelt arguments, short texts of objects, progress."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import merganser
from merganser.engine.notebook import in_notebook
from merganser.errors import TaskError
from merganser.evaluation.roster import make_roster
from tests.cli.tiny import state, write

RECIPE = {"merge_method": "linear", "models": [{"model": "one"}, {"model": "two"}], "parameters": {"weight": 1.0}}


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / name, state(seed))
    monkeypatch.chdir(tmp_path)


def test_a_misspelt_argument_is_answered() -> None:
    with pytest.raises(TypeError, match=r"plan: unknown argument 'thread'\. Did you mean 'threads'\? plan takes "):
        merganser.plan(RECIPE, thread=1)
    with pytest.raises(TypeError, match=r"merge: unknown argument 'overwrit'\. Did you mean 'overwrite'\?"):
        merganser.merge(RECIPE, "out", overwrit=True)
    assert not Path("out").exists()
    for call, given in (
        (merganser.evaluate, {"taks": []}),
        (merganser.calibrate, {"statistic": ()}),
        (merganser.diff, {"cachedir": None}),
        (merganser.inspect, {"cachedir": None}),
        (merganser.kinship, {"cachedir": None}),
        (merganser.restore, {"overwrit": True}),
        (merganser.verify, {"progres": None}),
        (merganser.write_report, {"overwrit": True}),
    ):
        (name,) = given
        with pytest.raises(
            TypeError,
            match=rf"^{call.__name__}: unknown argument '{name}'\. Did you mean '\w+'\? {call.__name__} takes ",
        ):
            call("one", **given)
    with pytest.raises(TypeError, match="the first argument is the name of a method, got list"):
        merganser.merge_state_dicts([{}, {}], "linear")


def test_objects_have_short_texts() -> None:
    plan = merganser.plan(RECIPE)
    assert repr(plan) == "<Plan: linear, 2 checkpoints, 19 tensors, writes 5.01 KB>"
    result = merganser.merge(RECIPE, "a<b", threads=1)
    assert repr(result) == "<Result: a<b, linear>"
    assert "<caption>Result: a&lt;b, linear</caption>" in result._repr_html_()
    assert "<td>writes</td><td>5.01 KB</td>" in plan._repr_html_()


def test_a_notebook_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, content: dict[str, Any], raw: bool) -> None:
            shown.append(content["text/plain"])

    def display(content: dict[str, Any], raw: bool, display_id: bool) -> Handle:
        shown.append(content["text/plain"])
        return Handle()

    shell = SimpleNamespace(kernel=None)
    fake = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=display))
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert in_notebook()
    merganser.merge(RECIPE, "out", threads=1)
    assert shown[0] == "linear: starts"
    assert shown[-1].startswith("linear: 19 of 19 tensors, ")
    del shell.kernel
    assert not in_notebook()


def test_an_evaluation_takes_recipes_as_mappings() -> None:
    entry, other = make_roster([RECIPE, "one"], None, (), []).entries
    assert (entry.name, other.name) == ("recipe", "one")
    named, *_ = make_roster({"half": RECIPE}, None, (), []).entries
    assert named.name == "half"
    with pytest.raises(TaskError, match="got one recipe; give a list of models"):
        make_roster(RECIPE, None, (), [])
