"""The time of `merganser calibrate` beside that of an ordinary forward of the same tokens."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from .processes import BATCH, LENGTH, draw, merganser, ours

BAR = 1.6
SEQUENCES = 64


def measure(zoo: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure both in turns; ratios are of processor seconds of whole commands."""
    model, text = zoo / "base", zoo / "texts" / "english.train.txt"
    tokens = folder / "tokens.pt"
    torch.save(draw(model, text, SEQUENCES), tokens)
    command = ["calibrate", str(model), "--data", str(text), "--out", str(folder / "out"), "--statistics", "gram"]
    command += [
        "--sequences",
        str(SEQUENCES),
        "--length",
        str(LENGTH),
        "--batch-tokens",
        str(BATCH * LENGTH),
        "--quiet",
    ]
    taken: dict[str, list[dict[str, float]]] = {"calibrate": [], "forward": [], "without_head": []}
    for _ in range(options.runs):
        usage = merganser(command, folder)
        taken["calibrate"].append({"cpu": usage.cpu_seconds, "wall": usage.seconds, "elsewhere": usage.elsewhere})
        shutil.rmtree(folder / "out")
        for side in ("forward", "without_head"):
            job = {"model": str(model), "tokens": str(tokens), "head": side == "forward"}
            usage, said = ours("forward", job, folder)
            own = {"cpu": usage.cpu_seconds, "wall": usage.seconds, "elsewhere": usage.elsewhere, **said}
            taken[side].append(own)
    best = {side: min(runs, key=lambda own: own["cpu"]) for side, runs in taken.items()}
    cpu = best["calibrate"]["cpu"]
    return {
        "tokens": SEQUENCES * LENGTH,
        "bar": BAR,
        "ratio": round(cpu / best["forward"]["cpu"], 3),
        "ratio_without_head": round(cpu / best["without_head"]["cpu"], 3),
        "best": {side: _rounded(own) for side, own in best.items()},
        "all_cpu": {side: [round(own["cpu"], 2) for own in runs] for side, runs in taken.items()},
    }


def _rounded(own: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in own.items()}
