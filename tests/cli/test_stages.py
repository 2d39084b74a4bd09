"""Recipes of several documents: results of one are models of the next."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merganser
from merganser import load_recipes
from merganser.engine.merge import merge, plan
from merganser.engine.run import Interrupted
from merganser.engine.stages import stages_folder
from merganser.errors import MergeError, OutputError, RecipeError
from tests.cli.tiny import linear, names, recipe, run, state, write

HOME = ".out.stages"


def chain(folder: Path, **more: Any) -> Path:
    """(a + b) / 2 under the name of first, then (first + c) / 2."""
    return recipe(folder / "r.yaml", linear("a", "b", name="first"), linear("first", "c", **more))


def test_a_folder_of_the_name_of_a_stage_is_said(models: Path) -> None:
    recipe(models / "r.yaml", linear("a", "b", name="c"), linear("c", "a"))
    found = run("plan", "r.yaml")
    assert found.code == 0
    assert (
        "r.yaml:11: 'c' is the result of the recipe at r.yaml:1, not the path of this name; rename one of them"
    ) in " ".join(found.out.split()) + " ".join(found.err.split())


def test_a_difference_from_mergekit_is_said_once(models: Path) -> None:
    documents = [linear("a", "b", name="first"), linear("first", "c")]
    for document in documents:
        document["models"][0]["parameters"]["weight"] = [0.2, 0.8]
    found = run("merge", recipe(models / "r.yaml", *documents), "out")
    assert found.err.count("note: first: differs from mergekit: weight: tensors after the layers") == 1
    assert found.err.count("differs from mergekit") == 1


def test_a_stage_that_is_named_like_a_model_on_the_hub_is_said(models: Path) -> None:
    recipe(models / "r.yaml", linear("a", "b", name="org/model"), linear("org/model", "c"))
    (warning,) = plan(models / "r.yaml").warnings
    assert "'org/model' is the result of the recipe at" in warning
    assert "not the model on the Hub of this name" in warning


class Counting:
    """A progress that counts runs, and may stop one."""

    def __init__(self, stop_in: str | None = "nowhere") -> None:
        self.started: list[str | None] = []
        self._stop_in = stop_in

    def start(self, plan: Any, continued: bool) -> None:
        self.started.append(plan.recipe.name)
        if plan.recipe.name == self._stop_in:
            raise KeyboardInterrupt

    def advance(self, read: int, written: int, tensors: int) -> None:
        pass


def test_stages(models: Path) -> None:
    found = run("merge", chain(models), "out")
    assert (found.code, found.err) == (0, "")
    assert "after the stages first" in found.out
    merged = load_file(models / "out" / "model.safetensors")
    a, b, c = (state(seed) for seed in range(3))
    for name, tensor in merged.items():
        first = ((a[name].double() + b[name].double()) / 2).to(torch.bfloat16)
        expected = ((first.double() + c[name].double()) / 2).to(torch.bfloat16)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    assert names(models) == ["a", "b", "c", "out", "r.yaml"]
    record = json.loads((models / "out" / "merge.json").read_text())
    assert record["recipe"] == (models / "r.yaml").read_text()
    assert "`first`" in (models / "out" / "README.md").read_text()
    assert run("verify", "out").code == 0


def test_plan_knows_what_does_not_exist_yet(models: Path) -> None:
    file = recipe(
        models / "r.yaml",
        linear("a", "b", name="first", dtype="float32"),
        {"merge_method": "slerp", "base_model": "first", "models": [{"model": "c"}], "parameters": {"t": 0.5}},
    )
    found = run("plan", file, "--out-shard-size", "2KB")
    assert (found.code, found.err) == (0, "")
    assert "Stage 1 of 2: first\n" in found.out
    assert "Stage 2 of 2\n" in found.out
    (line,) = [line for line in found.out.splitlines() if "made by an earlier stage" in line]
    assert line.split()[:2] == ["base", "first"]
    files = int(line.split()[2])
    assert files > 1
    assert "float32 (made by an earlier stage; planned from its headers)" in line
    assert "  first gives config.json, tokenizer.json\n" in found.out
    stages = run("plan", file, "--json").json["stages"]
    assert [stage["name"] for stage in stages] == ["first", None]
    assert [entry["reference"] for entry in stages[1]["inputs"]] == ["first", "c"]
    assert [entry["path"] for entry in stages[1]["inputs"]] == [None, "c"]
    assert names(models) == ["a", "b", "c", "r.yaml"]


def test_every_way_to_name_a_stage(models: Path) -> None:
    """As base, in slices and for the tokenizer."""
    (models / "a" / "tokenizer.json").write_text('{"of": "a"}')
    piece = [{"sources": [{"model": "c", "layer_range": [0, 1]}, {"model": "first", "layer_range": [0, 1]}]}]
    last = {
        "merge_method": "task_arithmetic",
        "base_model": "first",
        "slices": piece,
        "parameters": {"weight": 1.0},
        "tokenizer_source": "first",
    }
    found = run("merge", recipe(models / "r.yaml", linear("a", "b", name="first"), last), "out")
    assert (found.code, found.err) == (0, "")
    assert (models / "out" / "tokenizer.json").read_text() == '{"of": "a"}'
    assert json.loads((models / "out" / "config.json").read_text())["num_hidden_layers"] == 1


def test_documents_are_run_in_the_order_of_their_needs(models: Path) -> None:
    file = recipe(models / "r.yaml", linear("first", "c", name="last"), linear("a", "b", name="first"))
    counting = Counting()
    merge(load_recipes(file), "out", progress=counting)
    assert counting.started == ["first", "last"]


def test_a_name_with_a_slash(models: Path) -> None:
    documents = [linear("a", "b", name="x/y"), linear("a", "c", name="x"), linear("x", "x/y")]
    found = run("merge", recipe(models / "r.yaml", *documents), "out", "--keep-stages")
    assert (found.code, found.err) == (0, "")
    assert names(models / HOME) == ["x", "x%2Fy"]


def test_what_nobody_needs_is_not_made(models: Path) -> None:
    file = recipe(models / "r.yaml", linear("a", "b", name="spare"), linear("a", "c", name="last"))
    found = run("merge", file, "out")
    assert found.code == 0
    assert found.err == (
        f"warning: last: {file}:1: no later recipe uses the result of 'spare', so it is not run; "
        "--keep-stages runs it and keeps the result\n"
    )
    assert "after the stages" not in found.out
    assert "not run" in run("plan", file).out
    found = run("merge", file, "out", "--overwrite", "--keep-stages")
    assert (found.code, found.err) == (0, "")
    assert run("verify", stages_folder("out") / "spare").code == 0


def test_an_interrupted_run_continues_at_its_stage(models: Path) -> None:
    recipes = load_recipes(chain(models, name="last"))
    with pytest.raises(Interrupted, match=r"^out: stopped; run the same command again to continue$"):
        merge(recipes, "out", progress=Counting(stop_in="last"))
    assert names(models) == [".out.merging", HOME, "a", "b", "c", "r.yaml"]
    counting = Counting()
    merge(recipes, "out", progress=counting)
    assert counting.started == ["last"]
    assert names(models) == ["a", "b", "c", "out", "r.yaml"]


def test_an_interrupted_stage_says_how_to_go_on(models: Path) -> None:
    recipes = load_recipes(chain(models))
    with pytest.raises(Interrupted, match=r"^out: stopped while 'first' was made; run the same command again"):
        merge(recipes, "out", progress=Counting(stop_in="first"))
    counting = Counting()
    merge(recipes, "out", progress=counting)
    assert counting.started == ["first", None]


def _change_input(models: Path) -> None:
    write(models / "b", state(9))


def _change_recipe(models: Path) -> None:
    file = models / "r.yaml"
    file.write_text(file.read_text().replace("weight: 1.0", "weight: 2.0", 1))


def _change_result(models: Path) -> None:
    file = models / HOME / "first" / "tokenizer.json"
    file.write_text("{ }")


def _remove_result(models: Path) -> None:
    (models / HOME / "first" / "tokenizer.json").unlink()


def _break_note(models: Path) -> None:
    (models / HOME / "first" / ".stage.json").write_text("{")


CHANGES = [_change_input, _change_recipe, _remove_result, _break_note]


@pytest.mark.parametrize("change", CHANGES)
def test_a_stage_is_used_again_only_unchanged(models: Path, change: Any) -> None:
    file = chain(models)
    assert run("merge", file, "out", "--keep-stages").code == 0
    counting = Counting()
    merge(load_recipes(file), "out", overwrite=True, keep_stages=True, progress=counting)
    assert counting.started == [None]
    change(models)
    counting = Counting()
    merge(load_recipes(file), "out", overwrite=True, keep_stages=True, progress=counting)
    assert counting.started == ["first", None]


@pytest.mark.parametrize("more", [[], ["--fresh"], ["--keep-stages"]])
def test_a_result_that_a_user_changed_is_not_removed(models: Path, more: list[str]) -> None:
    file = chain(models)
    assert run("merge", file, "out", "--keep-stages").code == 0
    _change_result(models)
    found = run("merge", file, "out", "--overwrite", *more)
    assert found.code == 2
    assert ".out.stages/first: holds 'tokenizer.json', which has 3 bytes, and was written with 2" in found.err
    assert (models / HOME / "first" / "tokenizer.json").read_text() == "{ }"


@pytest.mark.parametrize("kind", ["file", "folder", "link", "link to a folder", "fifo", "lock", "home", "lock of home"])
@pytest.mark.parametrize("more", [[], ["--fresh"]])
def test_what_a_user_put_among_the_stages_stays(models: Path, kind: str, more: list[str]) -> None:
    planted = {
        "lock": models / HOME / ".x.merging.lock",
        "home": models / HOME,
        "lock of home": models / f"{HOME}.lock",
    }.get(kind, models / HOME / "first")
    planted.parent.mkdir(exist_ok=True)
    if kind == "folder":
        planted.mkdir()
        (planted / "thesis.txt").write_text("mine")
    elif kind == "fifo":
        os.mkfifo(planted)
    elif kind.startswith("link") or kind == "home":
        (models / "mine").mkdir()
        (models / "mine" / "thesis.txt").write_text("mine")
        planted.symlink_to(models / "mine" if kind in ("link to a folder", "home") else models / "mine" / "thesis.txt")
    else:
        planted.write_text("mine")
    before = {path: path.lstat() for path in models.rglob("*")}
    found = run("merge", chain(models), "out", *more)
    assert found.code == 2
    assert planted.name in found.err or "thesis.txt" in found.err
    assert {path: path.lstat().st_mtime_ns for path in before} == {p: s.st_mtime_ns for p, s in before.items()}
    assert not (models / "out").exists()


def test_what_came_among_the_stages_meanwhile_stays(models: Path) -> None:
    class Meddling(Counting):
        def start(self, plan: Any, continued: bool) -> None:
            super().start(plan, continued)
            if plan.recipe.name is None:
                (models / HOME / "first" / "thesis.txt").write_text("mine")

    merge(load_recipes(chain(models)), "out", progress=Meddling())
    assert (models / HOME / "first" / "thesis.txt").read_text() == "mine"


def test_fresh_starts_all_stages_again(models: Path) -> None:
    file = chain(models)
    assert run("merge", file, "out", "--keep-stages").code == 0
    counting = Counting()
    merge(load_recipes(file), "out", overwrite=True, fresh=True, progress=counting)
    assert counting.started == ["first", None]
    assert names(models) == ["a", "b", "c", "out", "r.yaml"]


def test_a_late_stage_is_refused_before_the_first_runs(models: Path) -> None:
    write(models / "wide", state(4, width=16))
    recipes = load_recipes(recipe(models / "r.yaml", linear("a", "b", name="first"), linear("first", "wide")))
    counting = Counting()
    with pytest.raises(MergeError, match=r"shapes differ.* in stage first, .* in wide") as caught:
        merge(recipes, "out", progress=counting)
    assert "/merganser-" not in str(caught.value)
    assert counting.started == []
    assert names(models) == ["a", "b", "c", "r.yaml", "wide"]


def test_nothing_is_left_after_a_stage_that_failed(models: Path) -> None:
    tensors = state(3)
    tensors["model.norm.weight"][0] = torch.inf
    write(models / "n", tensors)
    file = recipe(models / "r.yaml", linear("a", "b", name="first"), linear("first", "n"))
    found = run("merge", file, "out")
    assert found.code == 2
    assert "model.norm.weight" in found.err
    assert names(models) == ["a", "b", "c", "n", "r.yaml"]


def test_revision_of_a_stage(models: Path) -> None:
    recipes = load_recipes(recipe(models / "r.yaml", linear("a", "b", name="first"), linear("first@main", "c")))
    with pytest.raises(RecipeError, match="first@main names a revision, but 'first' is the result of an earlier"):
        plan(recipes)


def test_circle(models: Path) -> None:
    file = recipe(models / "r.yaml", linear("two", "a", name="one"), linear("one", "b", name="two"))
    found = run("merge", file, "out")
    assert found.code == 2
    assert "in a circle: 'one', 'two'" in found.err


def test_two_runs_into_one_target(models: Path) -> None:
    """The second is refused while the first works on a stage."""
    recipes = load_recipes(chain(models))
    inside, refused = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    class Waiting(Counting):
        def start(self, plan: Any, continued: bool) -> None:
            super().start(plan, continued)
            inside.set()
            assert refused.wait(30)

    def first() -> None:
        try:
            merge(recipes, "out", progress=Waiting())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    try:
        with pytest.raises(OutputError, match=r"^out: another run is writing it"):
            merge(recipes, "out")
    finally:
        refused.set()
        thread.join()
    assert errors == []
    assert names(models) == ["a", "b", "c", "out", "r.yaml"]


def test_existing_target_is_refused_first(models: Path) -> None:
    found = run("merge", chain(models), "a")
    assert found.code == 2
    assert "exists; choose another target" in found.err
    assert names(models) == ["a", "b", "c", "r.yaml"]


def test_python_takes_what_the_command_line_takes(models: Path) -> None:
    """A path, a YAML text and loaded recipes of several documents, planned and merged through the public names."""
    file = chain(models)
    assert run("merge", file, "out").code == 0
    for number, given in enumerate((file, str(file), file.read_text(), load_recipes(file))):
        planned = merganser.plan(given)
        assert [stage.recipe.name for stage in (*planned.stages, planned)] == ["first", None]
        assert planned.shown(next(iter(planned.made))) == "first"
        merganser.merge(given, f"out-{number}")
        assert merganser.diff("out", f"out-{number}").identical
