"""The memory that a process says it took."""

import subprocess
import sys

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
