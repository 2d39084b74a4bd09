"""What a command takes, and the least that its reading and writing takes."""

import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PIECE = 1 << 22
"""Bytes that plain reads and writes move at once."""

_LAUNCHER = Path(__file__).with_name("launch.py")
# they would decide the number of threads instead of the tools, or have Python compile our modules in every run: those of an
# installed package are compiled once
_UNWANTED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")


class CommandError(RuntimeError):
    """A measured command failed, or ran too long."""


class KilledError(CommandError):
    """It ran too long."""


@dataclass(frozen=True)
class Usage:
    """What a process and those that it started took.

    Args:
        seconds: Wall time.
        cpu_seconds: User and system time.
        peak_bytes: Largest resident memory of one process, pages of mapped files included.
        elsewhere: Processors that something else kept busy meanwhile, on average; about 0 on a quiet machine.
        stolen: Processors that the host took away meanwhile, on average.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    elsewhere: float
    stolen: float


@dataclass(frozen=True)
class Floor:
    """Plain reads of the inputs and a plain write of the output's size to a fresh file, in pieces of 4 MB.

    Args:
        read: Seconds to read.
        write: Seconds to write, into the page cache as far as the system lets it.
        sync: Seconds of the fsync that follows.
        cached: Share of the inputs that lay in the page cache before.
    """

    read: float
    write: float
    sync: float
    cached: float

    @property
    def seconds(self) -> float:
        """Reading and writing."""
        return self.read + self.write


def run(
    command: Sequence[str], log: Path, *, timeout: float = 3600, environment: Mapping[str, str] | None = None
) -> Usage:
    """Run a command as a process of its own; nothing that was written before is still on its way to the disk.

    Raises:
        KilledError: It ran longer than `timeout`.
        CommandError: It failed. The message of both has the end of its output.
    """
    surroundings = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
    surroundings.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **(environment or {})})
    os.sync()
    launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(log), str(timeout), *command]
    busy, stolen = _processor_seconds()
    answer = subprocess.run(launcher, capture_output=True, text=True, env=surroundings, check=True).stdout
    busy_after, stolen_after = _processor_seconds()
    found = json.loads(answer)
    if found["code"]:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        why = f"was killed after {timeout:.0f} s" if found["late"] else f"ended with {found['code']}"
        raise (KilledError if found["late"] else CommandError)(f"{' '.join(command)}\n{why}:\n{tail}")
    seconds = found["seconds"]
    return Usage(
        seconds=seconds,
        cpu_seconds=found["cpu_seconds"],
        peak_bytes=found["peak_bytes"],
        elsewhere=max(busy_after - busy - found["cpu_seconds"], 0) / seconds,
        stolen=(stolen_after - stolen) / seconds,
    )


def measure_floor(files: Sequence[Path], nbytes: int, folder: Path, *, cold: bool = False) -> Floor:
    """Read files and write a fresh one, plainly.

    Args:
        files: What to read.
        nbytes: How much to write.
        folder: Where to write; the file is removed.
        cold: Read from the disk, not from the page cache.
    """
    os.sync()
    if cold:
        forget(files)
    cached = cached_share(files)
    buffer = memoryview(bytearray(os.urandom(PIECE)))
    scratch = folder / "floor.bin"
    scratch.unlink(missing_ok=True)
    start = time.perf_counter()
    read_plainly(files, buffer)
    done_reading = time.perf_counter()
    file = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        opened = time.perf_counter()
        for at in range(0, nbytes, PIECE):
            _write_all(file, buffer[: min(PIECE, nbytes - at)])
        done_writing = time.perf_counter()
        os.fsync(file)
        synced = time.perf_counter()
    finally:
        os.close(file)
        scratch.unlink()
    return Floor(done_reading - start, done_writing - opened, synced - done_writing, cached)


def read_plainly(files: Iterable[Path], buffer: memoryview) -> int:
    """Read files from front to back into a buffer; return the number of bytes."""
    total = 0
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            while count := os.readv(file, [buffer]):
                total += count
        finally:
            os.close(file)
    return total


def forget(files: Iterable[Path]) -> None:
    """Drop files from the page cache; a virtual machine's host may keep them in its own."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def cached_share(files: Iterable[Path]) -> float:
    """Return which share of files lies in the page cache. Asks with mincore, which reads nothing into it."""
    system = ctypes.CDLL(None, use_errno=True)
    present = total = 0
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            pages = np.empty(-(-len(view) // mmap.PAGESIZE), np.uint8)
            address, size, answer = (ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view)), pages.ctypes.data)
            failed = system.mincore(address, size, ctypes.c_void_p(answer))
            del view
            if failed:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
            present += int((pages & 1).sum())
            total += len(pages)
    return round(present / total, 3) if total else 1.0


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return median, least and largest of some runs."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def as_json(found: Usage | Floor) -> dict[str, Any]:
    """Return a measurement for a result file."""
    return {name: value if isinstance(value, int) else round(value, 3) for name, value in asdict(found).items()}


def _write_all(file: int, view: memoryview) -> None:
    while view:
        view = view[os.write(file, view) :]


def _processor_seconds() -> tuple[float, float]:
    """Return the seconds that all processors were busy, and that the host took, since the machine started."""
    with open("/proc/stat", encoding="ascii") as file:  # noqa: PTH123
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick
