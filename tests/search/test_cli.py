"""`merganser search`: what it prints, what it refuses, and that a killed one continues."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.tiny import Output, run
from tests.evaluation.tiny import make_model
from tests.search.conftest import RECIPE

TASKS = ("--tasks", "one.jsonl", "two.jsonl")
QUICK = ("--trials", 2, "--sampler", "random", "--dtype", "float32", "--limit", 8)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return file


def searched(recipe: Path, *arguments: object, out: str = "out") -> Output:
    return run("search", recipe, recipe.parent / out, *arguments)


def test_what_it_prints(recipe: Path) -> None:
    found = searched(recipe, *TASKS, *QUICK)
    assert found.code == 0, found.err
    lines = found.out.splitlines()
    assert lines[0].startswith("trial 1/2  ")
    assert "  best so far  " in lines[0]
    assert lines[7] == "2 trials · random · 0.5*one/bits_per_byte+0.5*two/bits_per_byte (lower is better)"
    assert lines[8] in ("the best is trial 1", "the best is trial 2")
    assert [line.split()[0] for line in lines[9:11]] == ["parameters.weight[a]", "parameters.weight[b]"]
    assert lines[11] == "measured on 8 items that no trial saw (± standard error)"
    assert [line.split()[0] for line in lines[13:18]] == ["trial-000" + lines[8][-1], "base", "a", "b", "average"]
    out = recipe.parent / "out"
    assert lines[-2:] == [
        f"wrote {out}/winner.yaml; merganser merge {out}/winner.yaml OUT makes it",
        f"wrote {out}/report.html; open it in a browser",
    ]
    assert run("merge", out / "winner.yaml", recipe.parent / "merged").code == 0
    again = searched(recipe, *TASKS, *QUICK, "--json")
    assert json.loads(again.out) == json.loads((out / "result.json").read_text())
    assert [trial["number"] for trial in json.loads(again.out)["trials"]] == [0, 1]
    (out / "report.html").write_text("mine")
    mine = searched(recipe, *TASKS, *QUICK)
    assert (mine.code, "note: no page was written: " in mine.err) == (0, True)
    assert (out / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "tasks: give --tasks, whose items are scored, or --command, which scores a merge; one of them"),
        ((*TASKS, "--command", "x {model}"), "tasks: give --tasks, whose items are scored, or --command"),
        (("--command", "x {model}"), "objective: a command has no default; give --objective NAME:maximize or"),
        (("--command", "x {model}", "--objective", "score"), "'score': whether higher or lower is better is missing; write score:maximize"),
        (("--command", "x {model}", "--objective", "score:up"), "'score:up' must end in :maximize or :minimize"),
        (("--command", "x", "--objective", "score:maximize"), "command: 'x' has no {model}"),
        ((*TASKS, "--objective", "one/bits_per_bite"), "'one/bits_per_bite' is not measured here. Did you mean 'one/bits_per_byte'?"),
        ((*TASKS, "--objective", "recovered/mean"), "'recovered/mean' is not measured here."),
        ((*TASKS, "--objective", "one/bits_per_byte:maximize"), "one/bits_per_byte is better lower"),
        ((*TASKS, "--objective", "one/bits_per_byte+one/token_accuracy"), "adds figures of which some are better high"),
        ((*TASKS, "--objective", "x*one/bits_per_byte"), "'x*one/bits_per_byte' is not measured here"),
        ((*TASKS, "--objective", "0*one/bits_per_byte"), "a weight must be above 0; :minimize turns the direction"),
        ((*TASKS, "--objective", "one/bits_per_byte", "one/bits_per_byte"), "'one/bits_per_byte' is given twice"),
        ((*TASKS, "--objective", "one/bits_per_byte+"), "has an empty term"),
        ((*TASKS, "quiz.jsonl"), "the figures here are not alike, so their mean has no meaning; give --objective"),
        ((*TASKS, "--at-least", "one/bits_per_byte"), "at-least: expected NAME=NUMBER, got 'one/bits_per_byte'"),
        ((*TASKS, "--at-most", "one/bits_per_byte=low"), "expected a number, got 'low'"),
        ((*TASKS, "--at-most", "one/bits_per_byte=nan"), "expected a finite number, got 'nan'"),
        ((*TASKS, "--at-most", "three=1"), "'three' is not measured here."),
        ((*TASKS, "--sampler", "cmaes"), "sampler: 'cmaes' is not known; known: auto, cma, tpe, gp, random, nsga2, nsga3, greedy, particles, quadratic"),
        ((*TASKS, "--sampler", "cma", "--at-most", "one/bits_per_byte=9"), "sampler: cma takes one objective without bounds"),
        ((*TASKS, "--storage", "none/study.log"), "none/study.log: there is no folder none; make it first"),
        ((*TASKS, "--storage", "base"), "base: is a folder; give the path of a file"),
        ((*TASKS, "--storage", "one.jsonl"), "one.jsonl: the journal of the study cannot be read: its first line is not an entry"),
        ((*TASKS, "--storage", "sqlite:study.db"), "storage sqlite:study.db: an address begins with sqlite://"),
        ((*TASKS, "--storage", "sqlite://study.db"), "sqlite has no host; write sqlite:///FILE, with three slashes"),
        ((*TASKS, "--storage", "sqlite:///none/study.db"), "storage sqlite:///none/study.db: cannot be opened: unable to open database file"),
        ((*TASKS, "--storage", "sqlite:///one.jsonl"), "storage sqlite:///one.jsonl: cannot be opened: file is not a database"),
        ((*TASKS, "--storage", "mongodb://localhost"), "storage mongodb://localhost: mongodb:// is not known; give the path of a journal"),
        ((*TASKS, "--storage", "postgresql:///study"), "storage postgresql:///study: names no host; write postgresql://HOST/..."),
        ((*TASKS, "--storage", "mysql://me:secret@127.0.0.1:1/study"), "storage mysql://me:***@127.0.0.1:1/study: nothing answers at 127.0.0.1:1"),
        ((*TASKS, "--storage", "postgresql://h:port/study"), "is not an address"),
        ((*TASKS, "--cluster", "127.0.0.1:1"), "--cluster 127.0.0.1:1: no Ray cluster answers there"),
        ((*TASKS, "--hours", "-1"), "hours: must be above 0, got -1"),
        ((*TASKS, "--lm-eval", "num_fewshot=1"), "lm-eval: arguments are given (num_fewshot), and no task is of lm-eval"),
        (("--tasks", "none.jsonl"), "none.jsonl: there is no such file."),
        (("--tasks", "arc_esy"), "arc_esy: no such file"),
        ((*TASKS, "--limit", "3"), "has 3 documents; a search needs at least 4: it chooses with one half"),
        ((*TASKS, "--experts", "one=a"), "experts: need a base (--base)"),
        ((*TASKS, "--base", "base", "--experts", "three=a"), "experts: 'three' is not a task."),
        ((*TASKS, "--base", "nowhere"), "model 'nowhere' not found"),
    ],
)  # fmt: skip
def test_what_it_refuses(recipe: Path, arguments: tuple[str, ...], message: str) -> None:
    found = searched(recipe, *arguments)
    assert found.code == 2, found.err
    assert message in found.err
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[-1, 1]", "[1, -1]"), "a range ends above its beginning"),
        (("{search: [-1, 1], per: model}", "1"), "leaves nothing open"),
        (("model: a", "model: nowhere"), "nowhere"),
        (("task_arithmetic", "task_arithmetics"), "task_arithmetics"),
        (("models: [{model: a}", "models: [{model: other}"), "other: has another tokenizer than the first model"),
        (("  weight", "  normalize: {search: auto}\n  lamda: 1\n  weight"), "Did you mean 'lambda'?"),
    ],
)
def test_recipes_that_it_refuses(recipe: Path, made: Path, change: tuple[str, str], message: str) -> None:
    if "other" in message and not (made / "other").exists():
        make_model(made / "other", 3, bos=True)
    recipe.write_text(RECIPE.replace(*change))
    found = searched(recipe, *TASKS, *QUICK)
    assert found.code == 2, found.err
    assert message in found.err


def test_cma_refuses_choices(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("search: [-1, 1]", "choices: [0, 1]"))
    found = searched(recipe, *TASKS, "--sampler", "cma")
    assert (found.code, "cma searches numbers, and this recipe has choices" in found.err) == (2, True)


def test_folders_that_it_refuses(recipe: Path) -> None:
    root = recipe.parent
    (root / "file").write_text("")
    (root / "mine").mkdir()
    (root / "mine" / "notes.txt").write_text("mine")
    for name, message in (
        ("file", "is a file; give the name of a folder"),
        ("mine", "exists and is not the folder of a search; choose another name"),
        ("none/out", "none; make it first"),
    ):
        found = searched(recipe, *TASKS, *QUICK, out=name)
        assert found.code == 2
        assert message in found.err
    assert [path.name for path in (root / "mine").iterdir()] == ["notes.txt"]


def test_what_it_refuses_to_continue(recipe: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = recipe.parent / "out"
    for name in ("base", "a", "b"):
        (recipe.parent / name).symlink_to(made / name)
    expert = recipe.parent / "expert"
    make_model(expert, 5, like=made / "base")
    task = recipe.parent / "task.jsonl"
    task.write_text((made / "one.jsonl").read_text())
    recipe.write_text(RECIPE.replace("model: a", f"model: {expert}"))
    tasks = ("--tasks", str(task))
    assert searched(recipe, *tasks, *QUICK).code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def refused(message: str, *arguments: object) -> None:
        found = searched(recipe, *tasks, *QUICK, *arguments)
        assert found.code == 2, found.out
        assert message in found.err
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before

    refused("begun with another seed: it was 0, and is 7; give what it was begun with, or another folder", "--seed", 7)
    refused("begun with another limit: it was 8, and is 9", "--limit", 9)
    refused("begun with another sampler: it was random, and is tpe", "--sampler", "tpe")
    refused(
        "begun with another bounds: it was [], and is ['task/bits_per_byte at most 9']",
        "--at-most",
        "task/bits_per_byte=9",
    )
    text = task.read_text()
    task.write_text(text.replace("cat", "dog"))
    refused("begun with another task: task was ")
    task.write_text(text)
    recipe.write_text(recipe.read_text().replace("[-1, 1]", "[-1, 2]"))
    refused("begun with another recipe: it was ")
    recipe.write_text(recipe.read_text().replace("[-1, 2]", "[-1, 1]"))
    weights = load_file(expert / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, expert / "model.safetensors", {"format": "pt"})
    refused("begun with another input: expert was ")
    save_file(weights, expert / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("merganser.evaluation.scoring.journal._PATIENCE", 0.05)
    with (out / "items.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused("items.jsonl: another evaluation is writing it; wait for it, or stop it")
    for name, message in (
        ("trials.log", "the journal of the study cannot be read"),
        ("items.jsonl", "is not a file of measurements of this version"),
        ("search.json", "its search.json is damaged"),
    ):
        (out / name).write_bytes(b"garbage\n" + before[name])
        before[name] = (out / name).read_bytes()
        refused(message)
        (out / name).write_bytes(before[name].removeprefix(b"garbage\n"))
        before[name] = (out / name).read_bytes()
    assert searched(recipe, *tasks, *QUICK).code == 0
