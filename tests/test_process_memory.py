"""The memory of a process: what it says it took, and what becomes of freed memory."""

import os
import subprocess
import sys

import pytest

from merganser.engine.plan.memory import default_memory
from merganser.process import count_peak, memory_here, peak_memory

CHILD = "from merganser.process import peak_memory; print(peak_memory())"


def test_it_grows_with_what_is_held_and_stays():
    before = peak_memory()
    held = b"x" * (before + 50_000_000)
    after = peak_memory()
    del held
    # the kernel counts pages to within a few hundred
    assert after >= before + 49_000_000
    assert peak_memory() >= after - 1_000_000


def test_a_large_parent_does_not_count():
    held = b"x" * 300_000_000
    child = int(subprocess.run([sys.executable, "-c", CHILD], capture_output=True, check=True, text=True).stdout)
    assert len(held) == 300_000_000
    assert 1_000_000 < child < 200_000_000


def test_processes_that_work_for_this_one_count(monkeypatch):
    monkeypatch.setattr("merganser.process._others", {})
    alone = peak_memory()
    count_peak("one", 3_000_000_000)
    count_peak("two", 1_000_000_000)
    # a successor of the first
    count_peak("one", 2_000_000_000)
    assert 4_000_000_000 + alone <= peak_memory() < 4_100_000_000 + alone


FREEING = """
import resource, sys, threading
import numpy as np
from merganser.process import reuse_freed_memory
if sys.argv[1] == "reuse":
    reuse_freed_memory()
def work():
    for _ in range(20):
        held = [np.ones(1 << 20) for _ in range(3)]
        del held
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def pages_taken(how: str, **environment: str) -> int:
    """Allocate and free 3 times 8 MB, again and again, on two threads; return how many pages came from the system."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FREEING, how]
    return int(subprocess.run(command, env={**clean, **environment}, capture_output=True, check=True, text=True).stdout)


# Of a glibc that is told nothing, chance decides whether it gives memory back; told of one threshold, it moves none by itself
# and gives back every array.
GIVEN_BACK = {"MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise():
    given_back = pages_taken("as it is", **GIVEN_BACK)
    assert pages_taken("reuse") < given_back / 4
    assert pages_taken("reuse", **GIVEN_BACK) > given_back / 2


GB = 1_000_000_000


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("", {}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": str(GB)}, GB),
        ("0::/a/b\n", {"a/b/memory.max": str(GB // 2), "a/memory.max": str(GB)}, GB // 2),
        # a container sees its own group at the top, under the name that the host has for it
        ("0::/docker/1f\n", {"memory.max": str(GB)}, GB),
        ("5:cpu:/\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": str(GB)}, GB),
        ("4:memory:/x\n", {"memory/memory.limit_in_bytes": str(GB)}, GB),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    ],
)
def test_a_container_has_the_memory_that_it_was_given(tmp_path, monkeypatch, groups, limits, expected):
    machine = memory_here(tmp_path)
    assert machine > 0
    for name, text in {
        **{f"sys/fs/cgroup/{name}": text for name, text in limits.items()},
        "proc/self/cgroup": groups,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_here(tmp_path) == (expected or machine)


@pytest.mark.parametrize(
    ("here", "expected"),
    [(None, 4 * GB), (100 * GB, 4 * GB), (8 * GB, 2 * GB), (2 * GB, GB), (GB // 2, GB // 2)],
)
def test_a_merge_takes_a_share_of_it(monkeypatch, here, expected):
    monkeypatch.setattr("merganser.engine.plan.memory.memory_here", lambda: here)
    assert default_memory() == expected
