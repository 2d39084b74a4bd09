"""RegMean of four experts: the whole command beside FusionBench's, and the errors of both against float64."""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..merge.measure import Usage
from ..spectral import peer
from .processes import LENGTH, draw, merganser, ours

EXPERTS = ("haskell", "maths", "medicine", "middle_english")
ALPHA = 0.5
# next to nothing, so that both sides solve for the same matrix
_RIDGE, _LIMIT = 1e-9, 1e6


def measure(zoo: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Merge on both sides, and in float64.

    Raises:
        PeerError: FusionBench is not there.
    """
    place = peer.folder(options.peer_folder)
    base, *experts = (
        own if options.layers is None else shortened(own, options.layers, folder / "models" / own.name)
        for own in (zoo / "base", *(zoo / "experts" / name for name in EXPERTS))
    )
    models = dict(zip(EXPERTS, experts, strict=True))
    texts = {name: zoo / "texts" / f"{name}.train.txt" for name in EXPERTS}
    tokens = {name: folder / f"{name}.pt" for name in EXPERTS}
    for name, file in tokens.items():
        torch.save(draw(models[name], texts[name], options.sequences), file)
    job = {"models": [str(own) for own in models.values()], "tokens": [str(own) for own in tokens.values()]}
    job |= {"alpha": ALPHA, "place": str(place)}
    sides: dict[str, Any] = {"merganser": [], "fusion_bench": []}
    for _ in range(options.runs):
        sides["merganser"].append(merge(base, models, texts, folder, options.sequences))
        sides["fusion_bench"].append(ours("peer", job | {"out": str(folder / "peer.safetensors")}, folder)[0])
    taken, _ = ours("reference", job | {"out": str(folder / "reference.safetensors")}, folder)
    files = {"merganser": folder / "merged" / "model.safetensors", "fusion_bench": folder / "peer.safetensors"}
    errors = {
        name: error(file, folder / "reference.safetensors", base / "model.safetensors") for name, file in files.items()
    }
    found = {name: {**described(runs), **errors[name]} for name, runs in sides.items()}
    return {
        "layers": json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"],
        "tokens_per_expert": options.sequences * LENGTH,
        "alpha": ALPHA,
        "fusion_bench": peer.version(place),
        "ratio": round(found["fusion_bench"]["cpu_seconds"] / found["merganser"]["cpu_seconds"], 2),
        "sides": found,
        "reference_cpu_seconds": round(taken.cpu_seconds, 1),
    }


def shortened(model: Path, layers: int, folder: Path) -> Path:
    """Write a model with its first layers alone."""
    folder.mkdir(parents=True)
    tensors = load_file(model / "model.safetensors")
    kept = {name: own for name, own in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in model.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def merge(base: Path, models: Mapping[str, Path], texts: Mapping[str, Path], folder: Path, sequences: int) -> Usage:
    """Run our whole command: four calibrations and the merge."""
    recipe = {
        "merge_method": "regmean",
        "base_model": str(base),
        "models": [{"model": str(own), "data": str(texts[name])} for name, own in models.items()],
        "data": {"sequences": sequences, "length": LENGTH},
        "parameters": {"alpha": ALPHA, "ridge": _RIDGE, "limit": _LIMIT},
        "dtype": "float32",
    }
    file = folder / "recipe.json"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return merganser(["merge", str(file), str(folder / "merged"), "--threads", "1", "--quiet", "--overwrite"], folder)


def described(runs: list[Usage]) -> dict[str, Any]:
    """Return the best of some runs."""
    best = min(runs, key=lambda own: own.cpu_seconds)
    return {
        "cpu_seconds": round(best.cpu_seconds, 2),
        "wall_seconds": round(best.seconds, 2),
        "elsewhere": round(best.elsewhere, 2),
        "peak_bytes": best.peak_bytes,
        "all_cpu_seconds": [round(own.cpu_seconds, 2) for own in runs],
    }


def error(merged: Path, expected: Path, base: Path) -> dict[str, float]:
    """Return the error over all matrices of the blocks, and of the worst one, over how far RegMean goes from the base."""
    off, far, worst = 0.0, 0.0, 0.0
    with safe_open(merged, "pt") as found, safe_open(expected, "pt") as right, safe_open(base, "pt") as start:
        for name in right.keys():  # noqa: SIM118
            goal = right.get_tensor(name)
            own, moved = (
                _squared(found.get_tensor(name).double() - goal),
                _squared(goal - start.get_tensor(name).double()),
            )
            off, far, worst = off + own, far + moved, max(worst, own / moved)
    return {"error": (off / far) ** 0.5, "worst_error": worst**0.5}


def _squared(difference: Tensor) -> float:
    return float(difference.square().sum())
