"""The working folder of what takes long: a kill while it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merganser.calibration.target import Target, check_absent
from merganser.calibration.writer import write_json
from merganser.errors import OutputError


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


def test_nothing_of_others_is_removed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.json").write_text("mine")
    with pytest.raises(OutputError, match="out: exists"):
        check_absent(tmp_path / "out")
    assert (tmp_path / "out" / "state.json").read_text() == "mine"
