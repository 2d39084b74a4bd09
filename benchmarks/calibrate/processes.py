"""Run what is measured, each as a process with one thread, and draw the tokens that both sides read."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from merganser.calibration.single.preparation import prepare
from merganser.statistics import Choice

from ..merge.measure import Usage, run

LENGTH = 256
"""Tokens of a sequence."""

BATCH = 8
"""Sequences of a batch, on both sides: `calibrate` takes 2,048 tokens by default."""


def merganser(arguments: Sequence[str], folder: Path) -> Usage:
    """Run a command of ours, with a cache in which nothing of earlier runs lies."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return run([sys.executable, "-m", "merganser", *arguments], folder / "log", environment=surroundings(folder))


def ours(module: str, job: dict[str, Any], folder: Path) -> tuple[Usage, dict[str, Any]]:
    """Run a module of this package on a job, and return what it took and what it says."""
    file, log = folder / f"{module}.json", folder / f"{module}.log"
    file.write_text(json.dumps(job), encoding="utf-8")
    usage = run([sys.executable, "-m", f"{__package__}.{module}", str(file)], log, environment=surroundings(folder))
    said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    return usage, json.loads(said[-1]) if said else {}


def surroundings(folder: Path) -> dict[str, str]:
    """Return the variables of a measured process."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "TQDM_DISABLE": "1",
    }


def draw(model: Path, text: Path, sequences: int) -> list[Tensor]:
    """Return the tokens that `calibrate` draws of a text, in its batches, int64, shape [sequences, LENGTH] each.

    Raises:
        ValueError: The text is shorter, so that there would be padding.
    """
    choice = Choice(sequences, LENGTH, 0, "all")
    with prepare(model, [text], choice=choice, batch_tokens=BATCH * LENGTH) as prepared:
        stacks = [batch.stacks[0] for batch in prepared.batches()]
    if any(not stack.full or stack.ids.shape[1] != LENGTH for stack in stacks):
        raise ValueError(f"{text}: has no {sequences} sequences of {LENGTH} tokens")
    return [stack.ids for stack in stacks]
