"""Merging, evaluating journals and spools where calls that only Linux and macOS have are missing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import merganser
from merganser import system
from merganser.calibration.forward.spool import Spool
from merganser.engine.output.lock import acquire_lock
from merganser.errors import OutputError
from merganser.evaluation.scoring.journal import Journal
from tests.making import assert_equal, make_recipe, read_model, write_llamas

WITHOUT = """
import os, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in {missing}:
    delattr(os, name)
sys.argv = ["merganser", *sys.argv[1:]]
from merganser.__main__ import main
main()
"""
MISSING = ("preadv", "pwrite", "pread", "posix_fadvise", "killpg", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK")


@pytest.fixture(params=["no locks", "msvcrt"])
def another_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without fcntl, or with the locks of Windows in its place."""
    held: set[tuple[int, int]] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        """Lock bytes as Windows does: a byte that another descriptor has locked is refused."""
        status = os.fstat(descriptor)
        place = (status.st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        assert (mode, count) == (2, 1)
        assert place[1] > status.st_size
        if place in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add(place)

    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(system, "fcntl", None)
    if request.param == "msvcrt":
        monkeypatch.setattr(system, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))


def test_a_merge_and_its_check_as_processes(tmp_path: Path) -> None:
    recipe = make_recipe("linear", write_llamas(tmp_path / "models", 2, layers=1), parameters={"weight": 0.5})
    merganser.merge(recipe, tmp_path / "usual")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    code = WITHOUT.format(missing=MISSING)
    for words in (["merge", str(file), str(tmp_path / "out")], ["verify", str(tmp_path / "out")]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert_equal(read_model(tmp_path / "usual"), read_model(tmp_path / "out"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_two_runs_exclude_each_other(tmp_path: Path, another_system: None) -> None:
    first = acquire_lock(tmp_path / "lock")
    assert first is not None
    assert acquire_lock(tmp_path / "lock") is None
    first.release()
    assert not list(tmp_path.iterdir())


def test_bytes_are_written_and_read_at_offsets_by_many_threads(tmp_path: Path, another_system: None) -> None:
    rows = torch.arange(64 * 1000, dtype=torch.float32).view(64, 1000)
    with Spool(tmp_path / "spool") as spool:
        threads = [threading.Thread(target=spool.write, args=(i, rows[i : i + 1])) for i in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(spool.read(0, 64, 1000, torch.float32), rows)


def test_a_journal_is_not_shared(tmp_path: Path, another_system: None) -> None:
    locked = system.msvcrt is not None
    with Journal(tmp_path / "items.jsonl") as journal:
        journal.add("key", 0, {"value": 1})
        if locked:
            with pytest.raises(OutputError, match="another evaluation is writing it"):
                Journal(tmp_path / "items.jsonl")


def test_a_lock_of_another_kind_of_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", failing)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="Input/output error"):
        system.lock(file.fileno())


def test_a_command_ends_without_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "killpg")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    system.end_session(process)
    assert process.wait() != 0


def test_flushing_early_changes_nothing_and_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 64)
    for found in (
        system._sync_file_range(),
        None,
        lambda *given: calls.append([getattr(g, "value", g) for g in given]),
    ):
        monkeypatch.setattr(system, "_sync_file_range", lambda found=found: found)
        descriptor = os.open(path, os.O_RDONLY)
        system.start_flush(descriptor, 4096, 1 << 33)
        os.close(descriptor)
    assert [given[1:] for given in calls] == [[4096, 1 << 33, 2]]
    assert path.read_bytes() == bytes(range(256)) * 64
