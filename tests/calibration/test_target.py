"""The working folder of what takes long: a kill while it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merganser.calibration import calibrate
from merganser.calibration.forward import stream
from merganser.calibration.output.target import Target, check_absent, remove_earlier
from merganser.calibration.output.writer import write_json
from merganser.calibration.recipes.statistics import make_statistics
from merganser.calibration.recipes.wanted import wanted_by
from merganser.calibration.recipes.within import _remove
from merganser.calibration.reverse import run as reverse
from merganser.errors import DataError, OutputError
from merganser.recipe import load_recipe
from tests.calibration.interrupting import killed_after_removing
from tests.evaluation.tiny import make_model, text


class _Stop(BaseException):
    """As a kill: no code of ours runs after it but `finally`."""


def work(out: Path) -> dict[str, Any]:
    """Make a folder with one file, and return the state that was there."""
    with Target(out, "the same work", "about.json") as target:
        state = dict(target.state)
        target.claim(["file"])
        (target.folder / "file").write_text("1")
        target.note({"done": 1})
        write_json(target.folder / "about.json", {})
        target.publish()
    return state


@pytest.mark.parametrize("behind", [False, True])
def test_a_run_killed_while_it_publishes(behind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original = tmp_path / "out", Path.rename

    def killed(self: Path, target: Path) -> Path:
        if Path(target) != out:
            return original(self, target)
        if behind:
            original(self, target)
        raise _Stop

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(_Stop):
        work(out)
    monkeypatch.undo()
    assert out.exists() == behind
    if behind:
        # no merge takes a finished folder for its own unfinished one
        assert not (out / ".merganser").exists()
        with pytest.raises(OutputError, match="out: exists"):
            check_absent(out)
    else:
        assert work(out) == {"done": 1}
    assert sorted(path.name for path in out.iterdir()) == ["about.json", "file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def long_work(out: Path, made: list[str], identity: str = "long work") -> None:
    """Make a folder with one file, by means of a folder and a file that it does not have at the end."""
    with Target(out, identity, "about.json") as target:
        if not target.finished:
            made.append(identity)
            target.claim(["file", "spool/", "learnt.pt"])
            (target.folder / "spool" / "inner").mkdir(parents=True)
            for name in ("file", "learnt.pt", "spool/inner/a"):
                (target.folder / name).write_text(identity)
            write_json(target.folder / "about.json", {})
        target.publish(["spool", "learnt.pt", "never"])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_killed_while_it_removes_what_it_needed_has_nothing_to_make_again(count: int, tmp_path: Path) -> None:
    out, made = tmp_path / "out", []
    with killed_after_removing(count):
        long_work(out, made)
    assert not out.exists()
    long_work(out, made)
    assert made == ["long work"]
    assert sorted(path.name for path in out.iterdir()) == ["about.json", "file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_work_is_not_taken_for_finished(tmp_path: Path) -> None:
    out, made = tmp_path / "out", []
    with killed_after_removing(1):
        long_work(out, made)
    long_work(out, made, "other work")
    assert made == ["long work", "other work"]
    assert (out / "file").read_text() == "other work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_calibration_killed_at_its_very_end_runs_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = make_model(tmp_path / "model", 1), tmp_path / "a.txt"
    data.write_text(text(1, 30))
    whole = calibrate(model, data, tmp_path / "whole", statistics=["gram", "fisher"], length=16)
    with killed_after_removing(1):
        calibrate(model, data, tmp_path / "out", statistics=["gram", "fisher"], length=16)
    monkeypatch.setattr(reverse.Reverse, "_visit_head", None)
    monkeypatch.setattr(stream.Stream, "advance", None)
    found = calibrate(model, data, tmp_path / "out", statistics=["gram", "fisher"], length=16)
    for file in whole.path.iterdir():
        assert (found.path / file.name).read_bytes() == file.read_bytes()
    assert len([*found.path.iterdir()]) == len([*whole.path.iterdir()])


def test_what_is_left_of_statistics_by_a_kill_is_removed_by_the_next_run(tmp_path: Path) -> None:
    """The description goes last, so that what there is still has one."""
    folder = tmp_path / "statistics"
    folder.mkdir()
    for name in ("a", "b", "mine"):
        (folder / name).write_text("1")
    write_json(folder / "statistics.json", {"files": ["gone already", "a", "b", "../outside", 3]})
    (tmp_path / "outside").write_text("1")
    remove_earlier(folder)
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert (tmp_path / "outside").exists()


def test_half_removed_statistics_are_made_again_where_they_are_ours(tmp_path: Path) -> None:
    model, data = make_model(tmp_path / "model", 1), tmp_path / "a.txt"
    data.write_text(text(1, 30))
    models = [{"model": str(model), "data": {"files": str(data), "length": 16}}]
    (wanted,) = wanted_by(
        load_recipe({"merge_method": "regmean", "base_model": str(make_model(tmp_path / "base", 0)), "models": models})
    )
    folder = tmp_path / "statistics"
    files = sorted(make_statistics(wanted, folder, kept=False, cache_dir=None, progress=None).path.iterdir())
    files[0].unlink()
    with pytest.raises(DataError, match=files[0].name):
        make_statistics(wanted, folder, kept=True, cache_dir=None, progress=None)
    make_statistics(wanted, folder, kept=False, cache_dir=None, progress=None)
    assert sorted(folder.iterdir()) == files


def test_statistics_of_an_earlier_recipe_are_removed_whatever_its_models_are_called(tmp_path: Path) -> None:
    folder = tmp_path / "within-1"
    for name in ("a", "half-removed"):
        (folder / name).mkdir(parents=True)
    (folder / "a" / "file").write_text("1")
    write_json(folder / "a" / "statistics.json", {"files": ["file"]})
    _remove(folder)
    assert not folder.exists()
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "mine").write_text("1")
    with pytest.raises(OutputError, match="within-1: cannot be written"):
        _remove(folder)
    assert (folder / "b" / "mine").exists()


def test_nothing_of_others_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.json").write_text("mine")
    with pytest.raises(OutputError, match="out: exists"):
        check_absent(tmp_path / "out")
    assert (tmp_path / "out" / "state.json").read_text() == "mine"
