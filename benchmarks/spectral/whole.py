"""`python -m benchmarks.spectral.whole [options]`: whole merges by methods that decompose matrices, beside FusionBench.

Ours are commands, with loading and writing. FusionBench's time is that of one matrix of each shape times their number,
without loading and writing; the 300 steps of its WUDI are extrapolated from one and ten. What is scaled is marked.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from ..merge import hardware, measure
from ..merge.checkpoints import Shape
from . import peer
from .cases import Case, extrapolated, run_alone

QWEN = Shape(896, 4864, 24, 151936, heads=14)
TINY = Shape(128, 256, 2, 512, heads=2)
METHODS = ("iso_c", "tsv_m", "wudi", "svc")
RELATIVE = 0.003
"""Norm of a task vector over that of the base."""

EXPERTS = 4
_RANK = 64

_STEPS = 10
"""Steps of FusionBench's WUDI from which 300 are extrapolated."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spectral.whole", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="for models and outputs")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of both sides (default: 2)")
    parser.add_argument("--wudi-layers", type=int, default=3, metavar="N", help="layers of WUDI's model (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try this command")
    parser.add_argument("--peer-folder", type=Path, metavar="DIR", help=f"FusionBench (default: ${peer.VARIABLE})")
    options = parser.parse_args(arguments)
    hardware.complain_if_busy()
    try:
        compare(options)
    except (peer.PeerError, measure.CommandError) as failure:
        sys.stderr.write(f"bench: {failure}\n")
        return 2
    return 0


def compare(options: argparse.Namespace) -> None:
    """Measure both sides, method by method, and print what they take.

    Raises:
        PeerError: FusionBench is not there.
        CommandError: A merge failed.
    """
    theirs = peer.load(peer.folder(options.peer_folder))
    shape = TINY if options.tiny else QWEN
    few = Shape(shape.hidden, shape.ffn, min(options.wudi_layers, shape.layers), shape.vocab, shape.heads)
    for method in METHODS:
        one = few if method == "wudi" else shape
        used = merge(method, make_models(options.folder, one, options.threads), options.threads)
        scale = shape.layers / one.layers
        scaled = f" (of {one.layers} of {shape.layers} layers, start-up and the embedding too)" if scale != 1 else ""
        _say(f"{method:6s} merganser {used.seconds * scale:.1f} s, processor {used.cpu_seconds * scale:.1f} s{scaled}")
        found = sum(n * _matrix(theirs[method], method, dims, options.threads) for dims, n in matrices(shape).items())
        steps = f", 300 steps from 1 and {_STEPS}" if method == "wudi" else ""
        _say(f"{method:6s} FusionBench {found:.1f} s (one matrix of each shape, scaled{steps})")


def matrices(shape: Shape) -> Counter[tuple[int, int]]:
    """Return how many matrices of each shape there are in the layers."""
    found = [dims for name, dims in shape.tensors if name.startswith("model.layers.") and len(dims) == 2]
    return Counter((dims[0], dims[-1]) for dims in found)


def make_models(folder: Path, shape: Shape, threads: int) -> Path:
    """Make a base and experts of random weights, unless they are there; return their folder.

    Task vectors have as much in leading directions that get smaller as in an even rest.
    """
    place = folder / f"{shape.hidden}-{shape.layers}"
    if (place / "made").exists():
        return place
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(dims, generator=generator).mul_(0.02).bfloat16() for name, dims in shape.tensors}
    _save(place / "base", base, shape)
    falling = torch.arange(3.0, 3 + _RANK) ** -0.6
    for expert in range(EXPERTS):
        tensors = dict(base)
        for name, start in base.items():
            if start.ndim == 2 and name.startswith("model.layers."):
                left, right = (torch.randn(size, _RANK, generator=generator) for size in start.shape)
                change = torch.randn(start.shape, generator=generator)
                leading = left * falling @ right.T
                change += leading * (change.norm() / leading.norm())
                tensors[name] = (start + change * (RELATIVE * start.float().norm() / change.norm())).bfloat16()
        _save(place / f"expert-{expert}", tensors, shape)
    (place / "made").touch()
    return place


def merge(method: str, models: Path, threads: int) -> measure.Usage:
    """Run one merge as a command; return what it took.

    Raises:
        CommandError: It failed.
    """
    recipe, out = models / f"{method}.yaml", models / "out"
    experts = [{"model": str(models / f"expert-{i}")} for i in range(EXPERTS)]
    text = {"merge_method": method, "base_model": str(models / "base"), "models": experts, "dtype": "bfloat16"}
    recipe.write_text(yaml.safe_dump(text), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "merganser", "merge", str(recipe), str(out), "--threads", str(threads)]
    used = measure.run(command, models / "log.txt")
    shutil.rmtree(out)
    return used


def _matrix(theirs: Callable[[int], peer.Merge], method: str, dims: tuple[int, int], threads: int) -> float:
    vectors = Case(method, dims, EXPERTS).vectors()
    # the first call loads libraries, too
    run_alone(theirs(1), vectors, threads)
    first = run_alone(theirs(1), vectors, threads)[0]
    if method != "wudi":
        return first["seconds"]
    return extrapolated(first, run_alone(theirs(_STEPS), vectors, threads)[0], _STEPS)["seconds"]


def _save(place: Path, tensors: dict[str, torch.Tensor], shape: Shape) -> None:
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(shape.config, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
