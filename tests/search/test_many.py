"""Several processes on one study: who works on what, one killed, the table that all write, and where trials are stored."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from merganser.errors import MergeError, OutputError
from merganser.evaluation.scoring.journal import SharedJournal
from merganser.search import Found, search
from merganser.search import run as search_run
from merganser.search import study as study_module
from merganser.search.many import claims as claims_module
from merganser.search.many.claims import Claims
from merganser.search.many.cluster import Worker, find_places
from merganser.search.space.space import Dimension
from merganser.search.study import Study
from merganser.search.trials import Silent, Trial
from tests.search.conftest import RECIPE

TASKS = ["one.jsonl", "two.jsonl"]
# one wave of items: which trials end early depends on what others have finished
GIVEN: dict[str, Any] = {"trials": 8, "sampler": "random", "dtype": "float32", "limit": 8}
SPACE = [Dimension("x", 0.0, 1.0), Dimension("c", 0, 1, choices=("a", "b"))]


def figures(found: Found) -> list[Any]:
    return [(t.number, t.settings, t.values, t.items, t.same_as) for t in found.trials]


def lines(out: Path) -> list[str]:
    return sorted((out / "items.jsonl").read_text().splitlines())


def measured(out: Path) -> list[str]:
    """The lines without how long they took."""
    entries = [json.loads(line) for line in lines(out)]
    return sorted(str({key: own for key, own in entry.items() if key not in ("seconds", "check")}) for entry in entries)


def keys(out: Path) -> Counter[tuple[str, int]]:
    entries = [json.loads(line) for line in lines(out)]
    return Counter((entry["key"], entry["batch"]) for entry in entries if "key" in entry)


class Kill(Silent):
    """Kills another process when this one has finished a trial."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.own = process, 0

    def over(self, trial: Trial, best: Trial | None) -> None:
        self.own += 1
        self.process.send_signal(signal.SIGKILL)


def test_two_processes_of_which_one_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "r.yaml").write_text(RECIPE)
    whole = search(RECIPE, tmp_path / "whole", TASKS, **GIVEN)
    options = [word for key, value in GIVEN.items() for word in (f"--{key}", str(value))]
    command = [
        sys.executable,
        "-m",
        "merganser",
        "search",
        str(tmp_path / "r.yaml"),
        str(out),
        "--tasks",
        *TASKS,
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (out / "recipes" / "trial-0002.yaml").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    kill = Kill(process)
    found = search(RECIPE, out, TASKS, progress=kill, **GIVEN)
    assert process.wait() == -signal.SIGKILL
    assert 0 < kill.own < 8
    assert figures(found) == figures(whole)
    assert measured(out) == measured(tmp_path / "whole")
    assert set(keys(out).values()) == {1}
    assert (out / "winner.yaml").read_text() == (tmp_path / "whole" / "winner.yaml").read_text()
    assert not (out / "claims").exists()


def test_a_trial_whose_process_is_dead_is_taken_over(tmp_path: Path) -> None:
    def study(claims: Claims) -> Study:
        return Study(tmp_path / "t.log", SPACE[:1], ["maximize"], "random", 3, {"x": 0.5}, claims=claims)

    claims = [Claims(tmp_path / "claims") for _ in range(4)]
    studies = [study(each) for each in claims]
    asked = [each.ask(3) for each in studies]
    assert [each and each.number for each in asked] == [0, 1, 2, None]
    # what a process asked for and did not tell, it has left
    again = studies[0].ask(3)
    assert again is not None
    assert (again.number, again.point) == (0, asked[0].point)  # type: ignore[union-attr]
    studies[1].tell(asked[1], [1.0], {}, {})  # type: ignore[arg-type]
    assert studies[1].busy
    claims[0].close()
    taken = studies[3].ask(3)
    assert taken is not None
    assert (taken.number, taken.point) == (0, again.point)
    studies[3].tell(taken, [2.0], {}, {})
    # a process that was taken for dead tells what is known already
    studies[0].tell(again, [2.0], {"seconds": 1.0}, {})
    assert studies[3].ask(3) is None
    assert [told.number for told in studies[3].told] == [0, 1]
    assert dict(studies[3].told[0].about) == {"process": claims[3].name}
    for each in claims[1:]:
        each.close()
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_killed_between_two_values_of_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    space = [Dimension(name, 0.0, 1.0) for name in "xyz"]

    def told(path: Path, cut: tuple[int, int]) -> list[Any]:
        study = Study(path, space, ["maximize"], sampler, 3, dict.fromkeys("xyz", 0.5))
        for number in range(4):
            for left in range(*(cut if number == 2 else (0, 0))):
                drawn = iter([True] * left)

                def failing(trial: Any, name: str, space: Any, drawn: Any = drawn) -> Any:
                    next(drawn)
                    return suggest(trial, name, space)

                monkeypatch.setattr(study_module, "_suggest", failing)
                with pytest.raises(StopIteration):
                    study.ask()
            monkeypatch.setattr(study_module, "_suggest", suggest)
            asked = study.ask()
            assert asked is not None
            study.tell(asked, [float(sum(asked.point.values()))], {}, {})
        return [(each.number, each.point) for each in study.told]

    suggest = study_module._suggest
    assert told(tmp_path / "cut.log", (0, 3)) == told(tmp_path / "whole.log", (0, 0))


def test_no_two_processes_have_trials_of_one_recipe(tmp_path: Path) -> None:
    one, two = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    studies = [
        Study(tmp_path / "t.log", SPACE[1:], ["maximize"], "random", 0, {"c": 0}, claims=claims)
        for claims in (one, two)
    ]
    asked = studies[0].ask(9)
    found = None
    for _ in range(9):
        found = studies[1].ask(9)
        if found is None:
            break
        assert found.point != asked.point  # type: ignore[union-attr]
        studies[1].tell(found, [0.0], {}, {})
    # it waits until the recipe has a figure, and does not ask for more meanwhile
    assert found is None
    assert studies[1].ask(9) is None
    studies[0].tell(asked, [1.0], {}, {})  # type: ignore[arg-type]
    found = studies[1].ask(9)
    assert found is not None
    assert found.point == asked.point  # type: ignore[union-attr]
    one.close()
    two.close()


def _claim(folder: Path, name: str, machine: str | None, process: int, age: float = 0.0) -> None:
    (folder / name).write_text(json.dumps({"machine": machine or claims_module._machine(), "process": process}))
    touched = time.time() - age
    os.utime(folder / name, (touched, touched))


def test_who_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "claims"
    one, two = Claims(folder), Claims(folder)
    assert one.lives(one.name)
    assert one.lives(two.name)
    assert one.others() == [two.name]
    # a process of this machine that holds no lock is dead, whatever has its number now; of another one the touch counts
    _claim(folder, "here", None, os.getpid())
    _claim(folder, "far", "another machine", os.getpid())
    _claim(folder, "long-ago", "another machine", os.getpid(), 120)
    (folder / "odd").write_text("[")
    os.utime(folder / "odd", (0, 0))
    assert [one.lives(name) for name in ("here", "far", "long-ago", "nobody")] == [False, True, False, False]
    assert [(folder / name).exists() for name in ("here", "far", "long-ago")] == [False, True, False]
    # without locks the number of the process counts on this machine
    monkeypatch.setattr(claims_module, "lock", lambda _: False)
    _claim(folder, "here", None, os.getpid())
    _claim(folder, "gone", None, 2**22 + 1)
    assert (one.lives("here"), one.lives("gone")) == (True, False)
    with pytest.raises(OutputError, match="this file system has no locks, so one process has a study at a time"):
        Claims(folder)
    monkeypatch.undo()
    assert set(two.others()) == {one.name, "far"}
    (folder / "far").unlink()
    one.close()
    assert folder.exists()
    two.close()
    assert not folder.exists()


def test_turns(tmp_path: Path) -> None:
    claims = [Claims(tmp_path / "claims") for _ in range(2)]
    inside: list[int] = []
    most: list[int] = []

    def work(own: Claims) -> None:
        for _ in range(20):
            with own.turn("x"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work, args=(own,)) for own in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 40
    for own in claims:
        own.close()


def test_the_table_that_several_write(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    one, two = SharedJournal(path), SharedJournal(path)
    one.add("a", 0, {"x": 1})
    assert two.get("a", 0) is None
    two.refresh()
    assert two.get("a", 0) == {"x": 1}
    # half a line of a process that was killed, then one that was damaged
    with path.open("ab") as file:
        file.write(b'{"check":"0')
    two.add("b", 0, {"x": 2})
    with path.open("ab") as file:
        file.write(b'{"check":"00"}\n')
    one.add("c", 0, {"x": 3})
    assert [one.get(key, 0) for key in "abc"] == [{"x": 1}, {"x": 2}, {"x": 3}]
    two.note("dtype", "float32")
    with SharedJournal(path) as third:
        assert sorted(third.keys) == [("a", 0), ("b", 0), ("c", 0)]
        assert third.notes == {"dtype": "float32"}
    assert path.read_bytes().count(b'{"check":"0') == 1
    one.close()
    two.close()
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="is not a file of measurements"):
        SharedJournal(path)
    assert path.read_bytes() == b"mine"


def test_trials_are_stored_where_it_is_said(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/study.db"
    given = {**GIVEN, "trials": 3, "limit": 4}
    first = search(RECIPE, tmp_path / "out", TASKS[:1], storage=address, **{**given, "trials": 2})
    # another search in the same place, and the first one continued
    other = search(RECIPE, tmp_path / "two", TASKS[:1], storage=address, **{**given, "trials": 1, "seed": 1})
    found = search(RECIPE, tmp_path / "out", TASKS[:1], storage=address, **given)
    assert figures(found)[:2] == figures(first)
    assert [trial.number for trial in found.trials] == [0, 1, 2]
    assert len(other.trials) == 1
    assert not (tmp_path / "out" / "trials.log").exists()
    with pytest.raises(MergeError, match=r"begun with another storage: it was .*, and is nothing"):
        search(RECIPE, tmp_path / "out", TASKS[:1], **given)


def test_another_journal(tmp_path: Path) -> None:
    for name in ("one", "two"):
        study = Study(str(tmp_path / "study.log"), SPACE[:1], ["maximize"], "random", 0, {"x": 0.5}, name=name)
        asked = study.ask()
        assert asked is not None
        study.tell(asked, [1.0], {}, {})
        assert [told.number for told in study.told] == [0]


def test_a_worker_of_a_cluster_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spread(cluster: Any, request: Any, folder: Any, trials: Any, deadline: Any, progress: Any) -> None:
        here = str(Path.cwd())
        assert Worker(here, folder.path, request, 1).run(None) is None
        assert len(trials.refresh()) == 3
        error = Worker(here, tmp_path / "elsewhere", request, 1).run(None)
        assert "elsewhere: not found on a node of the cluster" in str(error)
        error = Worker(str(tmp_path / "none"), folder.path, request, 1).run(None)
        assert "not found on a node of the cluster" in str(error)

    monkeypatch.setattr(search_run, "connect", contextlib.nullcontext)
    monkeypatch.setattr(search_run, "spread", spread)
    given = {**GIVEN, "trials": 3, "limit": 4}
    found = search(RECIPE, tmp_path / "out", TASKS[:1], cluster="auto", **given)
    assert figures(found) == figures(search(RECIPE, tmp_path / "whole", TASKS[:1], **given))


def test_places_of_a_cluster() -> None:
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 17.0, "GPU": 2.0}},
        {"NodeID": "b", "Alive": False, "Resources": {"CPU": 8.0}},
        {"NodeID": "c", "Alive": True, "Resources": {"CPU": 1.0}},
        {"NodeID": "d", "Alive": True, "Resources": {}},
    ]
    assert [(p.node, p.threads) for p in find_places(nodes, gpu=False)] == [("a", 8), ("a", 8), ("c", 1)]
    assert [(p.node, p.threads) for p in find_places(nodes, gpu=True)] == [("a", 8), ("a", 8)]
    with pytest.raises(MergeError, match="no node has a GPU for a worker"):
        find_places(nodes[1:], gpu=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_three_processes_killed_ten_times(tmp_path: Path) -> None:
    given = {**GIVEN, "trials": 24}
    whole = search(RECIPE, tmp_path / "whole", TASKS, **given)
    out = tmp_path / "out"
    chance = random.Random(0)
    context = multiprocessing.get_context("fork")

    def begin() -> Any:
        process = context.Process(target=search, args=(RECIPE, out, TASKS), kwargs=given, daemon=True)
        process.start()
        return process

    running = [begin() for _ in range(3)]
    for _ in range(10):
        time.sleep(chance.uniform(0.05, 1.0))
        victim = running.pop(chance.randrange(len(running)))
        victim.kill()
        victim.join()
        running.append(begin())
    for process in running:
        process.join(300)
        assert process.exitcode == 0
    found = search(RECIPE, out, TASKS, **given)
    assert figures(found) == figures(whole)
    assert measured(out) == measured(tmp_path / "whole")
    assert not (out / "claims").exists()
