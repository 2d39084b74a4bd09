"""Answer jobs, a line each: shared by `in_vllm.py` and `in_mlx.py`, which other Pythons run. It uses nothing of Merganser."""

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NEW_TOKENS = 16


def run(answer: Callable[[dict[str, Any]], dict[str, Any]], packages: Sequence[str]) -> None:
    """Answer the jobs of the first file that the command names, and append the answers to the second.

    Jobs that have an answer already are left out, so that a crash of one does not lose the others.

    Args:
        answer: Returns the answer to a job; what it raises is the answer, too.
        packages: Packages whose versions are noted, where they are installed.
    """
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = Path(sys.argv[2])
    known = {json.loads(line)["name"] for line in answers.read_text(encoding="utf-8").splitlines()}
    versions = _versions(packages)
    for job in jobs:
        if job["name"] in known:
            continue
        # the line of a job that kills the process stays
        _append(answers.with_suffix(".begun"), {"name": job["name"]})
        start = time.process_time()
        try:
            found = answer(job)
        except Exception as error:
            found = {"error": reason(error)}
        seconds = round(time.process_time() - start, 1)
        _append(answers, {"name": job["name"], "seconds": seconds, "versions": versions, **found})


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def reason(error: BaseException) -> str:
    """Return what an error says, without where it was raised."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines)}"[:600]


def _append(file: Path, entry: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry) + "\n")
