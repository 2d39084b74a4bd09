"""One run at a time writes a target, with locks of the file system and without."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import threading

import pytest

from merganser.engine.merge import merge
from merganser.engine.output.lock import acquire_lock
from merganser.errors import OutputError
from tests.engine.interrupting import Counter
from tests.making import make_recipe, write_llamas


@pytest.fixture(params=[errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def no_locks(request, monkeypatch):
    """A file system without locks."""

    def refusing(descriptor, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refusing)


def owner(path):
    return path.with_name(f"{path.name}.owner")


def test_a_second_run_is_refused_without_locks(tmp_path, no_locks):
    recipe = make_recipe("linear", write_llamas(tmp_path / "models", 2, layers=1), parameters={"weight": 0.5})
    refused = []

    class Rival(Counter):
        def start(self, plan, continued):
            with pytest.raises(OutputError, match="out: another run is writing it"):
                merge(recipe, tmp_path / "out")
            refused.append(True)

    merge(recipe, tmp_path / "out", progress=Rival())
    assert refused == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "out"]


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path, no_locks):
    path = tmp_path / "lock"
    # a fork inherits what stands for a file system without locks
    process = multiprocessing.get_context("fork").Process(target=lambda: (acquire_lock(path), os._exit(9)))
    process.start()
    process.join()
    assert owner(path).exists()
    held = acquire_lock(path)
    assert held is not None
    assert acquire_lock(path) is None
    held.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "value"), [(1, "another start of the host"), (2, 2**22 + 1), (3, "1"), (2, -1), (2, 10**30)]
)
def test_the_lock_of_an_owner_that_is_no_more(tmp_path, no_locks, part, value):
    path = tmp_path / "lock"
    acquire_lock(path)
    facts = json.loads(owner(path).read_text())
    facts[part] = value
    owner(path).write_text(json.dumps(facts))
    assert acquire_lock(path) is not None


def test_the_lock_of_another_host_is_left_to_the_user(tmp_path, no_locks):
    path = tmp_path / "lock"
    acquire_lock(path)
    owner(path).write_text(json.dumps(["elsewhere", *json.loads(owner(path).read_text())[1:]]))
    with pytest.raises(OutputError, match=r"lock\.owner: a run on 'elsewhere' .* if it has ended, delete this file"):
        acquire_lock(path)


@pytest.mark.parametrize("text", ["", "mine", "[]", "{}", "[1, 2, 3]", '["a", "b", "c", "d"]', "[" * 100_000])
def test_what_is_not_ours_is_not_removed(tmp_path, no_locks, text):
    path = tmp_path / "lock"
    owner(path).write_text(text)
    with pytest.raises(OutputError, match="has the name of our lock file"):
        acquire_lock(path)
    assert owner(path).read_text() == text


def test_one_of_many_takes_a_stale_lock(tmp_path, no_locks):
    path = tmp_path / "lock"
    acquire_lock(path)
    stale = owner(path).read_text().replace(str(os.getpid()), str(2**22 + 1))
    for _ in range(30):
        owner(path).write_text(stale)
        held = []
        barrier = threading.Barrier(4)

        def take(barrier=barrier, held=held):
            barrier.wait()
            held.append(acquire_lock(path))

        threads = [threading.Thread(target=take) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(each is not None for each in held) == 1


def test_an_error_that_is_not_about_locks_is_told(tmp_path, monkeypatch):
    def failing(descriptor, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match="Input/output error"):
        acquire_lock(tmp_path / "lock")
