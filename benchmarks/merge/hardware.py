"""The machine and the versions that a result belongs to."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import peer


def describe(folder: Path, peer_folder: Path | None = None) -> dict[str, Any]:
    """Describe machine and versions.

    Args:
        folder: Where checkpoints and outputs lie; only the kind of its filesystem is told.
        peer_folder: The virtual environment of mergekit, where it is measured.
    """
    found: dict[str, Any] = {
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "filesystem": filesystem(folder),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("merganser", "torch", "numpy")},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if peer_folder is not None:
        found["peer_versions"] = peer.versions(peer_folder)
    return found


def load() -> list[float]:
    """Return the load average over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def complain_if_busy() -> None:
    """Say so where the machine has other work: figures would be wrong."""
    now = os.getloadavg()[0]
    if now > 0.5:
        sys.stderr.write(f"bench: the machine is busy (load {now:.2f}); times will be too long\n")


def filesystem(folder: Path) -> str:
    """Return the kind of the filesystem that holds a folder."""
    place = folder.resolve()
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, this_kind, *_ = line.split(" ")
        mount = mount.encode().decode("unicode_escape")
        if place.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, this_kind
    return kind


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit that was measured, "+changes" behind it where files differ from it."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--", "src", "pyproject.toml") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
