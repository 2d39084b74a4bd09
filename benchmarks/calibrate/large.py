"""The peak memory and time of `merganser calibrate` for Gram matrices, on random blocks of the size of a 7 B model's.

The whole model would take 14 GB of disk and its Gram matrices 22 GB. One block is in memory at a time, so the peak is the same
for four of its 32 blocks and for eight, and what the other 24 take follows from the difference of the two.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from .memory import Shape, make_random
from .processes import LENGTH, merganser

BAR = 6_000_000_000
SEQUENCES = 2
WHOLE = Shape(width=4096, inner=11_008, blocks=32)
"""The width, MLP and depth of Llama 2 7B, with the vocabulary of SmolLM2."""
FEW, MORE = 4, 8


def measure(zoo: Path, folder: Path, _: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak on four and on eight blocks, and estimate what all 32 take."""
    rows = {str(blocks): _measured(replace(WHOLE, blocks=blocks), zoo, folder) for blocks in (FEW, MORE)}
    few, more = (rows[str(blocks)] for blocks in (FEW, MORE))
    block = {key: (more[key] - few[key]) / (MORE - FEW) for key in ("cpu_seconds", "seconds", "written_bytes")}
    return {
        "tokens": SEQUENCES * LENGTH,
        "bar_bytes": BAR,
        "parameters_of_all_blocks": WHOLE.parameters,
        "grams_of_one_block_bytes": WHOLE.grams,
        "blocks": rows,
        "of_one_block": {key: round(value, 2) for key, value in block.items()},
        "estimate_for_all": {
            key: round(more[key] + (WHOLE.blocks - MORE) * value) for key, value in block.items() if key != "seconds"
        },
    }


def _measured(shape: Shape, zoo: Path, folder: Path) -> dict[str, Any]:
    model, out = make_random(shape, zoo / "base", folder / "model"), folder / "out"
    command = ["calibrate", str(model), "--data", str(zoo / "texts" / "english.train.txt"), "--out", str(out)]
    try:
        usage = merganser([*command, "--sequences", str(SEQUENCES), "--length", str(LENGTH), "--quiet"], folder)
        written = sum(file.stat().st_size for file in out.iterdir())
    finally:
        for path in (model, out):
            shutil.rmtree(path, ignore_errors=True)
    return {
        "model_bytes": 2 * shape.parameters,
        "peak_bytes": usage.peak_bytes,
        "cpu_seconds": round(usage.cpu_seconds, 1),
        "seconds": round(usage.seconds, 1),
        "written_bytes": written,
    }
