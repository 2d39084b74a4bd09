"""The memory of a process: what it says it took, and what becomes of freed memory."""

import os
import subprocess
import sys

import pytest

from merganser.resident import peak_memory

CHILD = "from merganser.resident import peak_memory; print(peak_memory())"


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


FREEING = """
import resource, sys, threading
import numpy as np
from merganser.resident import reuse_freed_memory
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again():
    assert pages_taken("reuse") < pages_taken("as it is") / 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_what_the_environment_says_of_memory_is_left_alone():
    assert pages_taken("reuse", MALLOC_TRIM_THRESHOLD_="65536") > 10 * pages_taken("reuse")
