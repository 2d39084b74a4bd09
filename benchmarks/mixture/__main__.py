"""Build a mixture of random models, and merge the same models by `linear`: `python -m benchmarks.mixture [--models N] [--billions B]`.

Each is a process of its own. A line per run says what it took: seconds of the processor (wall time says nothing on a busy machine),
peak memory, and bytes read and written by the process, beside the least that they can be: what the output is made of, read
once, and the output, written once. Recipes differ in what the output is, so seconds are also given for each gigabyte that is
read or written. Router rows are random: those from text need the models to run, which is not building. `--distinct N` makes N
experts, and the others links to their files: less of the disk is needed, and as much is read.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merganser.engine.merge import plan
from merganser.mixture.run import plan_mixture

from ..merge import hardware
from ..merge.checkpoints import Models, Shape, make_models, shape_of
from ..merge.measure import run

NAMES = ("linear", "mixture", "mixture, shared parts averaged")

_COMMAND = """
import sys
from merganser.cli import make_app
code = 0
try:
    make_app(sys.argv[2])(sys.argv[2:])
except SystemExit as ended:
    code = ended.code or 0
open(sys.argv[1], "w").write(open("/proc/self/io").read())
sys.exit(code)
"""


def main() -> int:
    """Measure, and print a line per run."""
    parser = argparse.ArgumentParser(prog="scripts/bench mixture", description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", type=int, default=8, metavar="N")
    parser.add_argument(
        "--layers", type=int, default=12, metavar="N", help="of 6.6 million weights each, beside 12 million"
    )
    parser.add_argument("--billions", type=float, metavar="B", help="weights of each model, in place of --layers")
    parser.add_argument("--distinct", type=int, metavar="N", help="experts that are not links (default: all)")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--recipes", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--work", type=Path, help="folder for models and outputs (default: a temporary one)")
    options = parser.parse_args()
    small = Shape(hidden=768, ffn=2048, layers=options.layers, vocab=16384, heads=12)
    shape = small if options.billions is None else shape_of(options.billions)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        made = make_models(work / "models", shape.tensors, options.distinct or options.models, shape.config)
        models = linked(made, options.models)
        for _ in range(options.repeat):
            for name, command in commands(models, work, options.threads).items():
                if name not in options.recipes:
                    continue
                row = {"what": name, "weights": shape.parameters, "models": options.models}
                row |= measure(name, command, models, work, options.threads)
                sys.stdout.write(f"{json.dumps(row)}\n")
                sys.stdout.flush()
        sys.stdout.write(f"{json.dumps(hardware.describe(work))}\n")
    return 0


def linked(models: Models, count: int) -> Models:
    """Return as many experts, the further ones folders of hard links to the files of those that there are."""
    experts = list(models.experts)
    for number in range(len(experts), count):
        folder = models.base.parent / f"expert-{number + 1}"
        folder.mkdir(exist_ok=True)
        for file in experts[number % len(models.experts)].iterdir():
            if not (folder / file.name).exists():
                (folder / file.name).hardlink_to(file)
        experts.append(folder)
    return replace(models, experts=tuple(experts[:count]))


def recipes(models: Models) -> dict[str, dict[str, Any]]:
    """Return the recipes by name: a plain merge, and two mixtures of the same models."""
    experts = [{"source_model": str(path)} for path in models.experts]
    mixture = {
        "base_model": str(models.base),
        "experts": experts,
        "shared_experts": [{"source_model": str(models.base)}],
        "architecture": "qwen2_moe",
        "gate_mode": "random",
    }
    listed = [{"model": str(path), "parameters": {"weight": 1}} for path in models.experts]
    averaged = {"merge_method": "linear", "parameters": {"weight": 1}}
    found = ({"merge_method": "linear", "models": listed}, mixture, {**mixture, "shared": averaged})
    return dict(zip(NAMES, found, strict=True))


def commands(models: Models, work: Path, threads: int) -> dict[str, list[str]]:
    """Write the recipes, and return the commands that carry them out, by name."""
    found = {}
    for number, (name, recipe) in enumerate(recipes(models).items()):
        file = work / f"{number}.yaml"
        file.write_text(json.dumps(recipe), encoding="utf-8")
        verb = "merge" if "merge_method" in recipe else "mix"
        out = ["--quiet", "--threads", str(threads)]
        found[name] = [sys.executable, "-c", _COMMAND, str(work / "io"), verb, str(file), str(work / "out"), *out]
    return found


def measure(name: str, command: list[str], models: Models, work: Path, threads: int) -> dict[str, Any]:
    """Run a command; return what it took, and the least that its bytes can be."""
    # with an output in its place the command would read it, too, to see whether it may be replaced
    shutil.rmtree(work / "out", ignore_errors=True)
    used = run(command, work / "log")
    counted = dict(line.split(": ") for line in (work / "io").read_text().splitlines())
    least = floor(recipes(models)[name])
    moved = (least["read"] + least["written"]) / 1e9
    return {
        "cpu_seconds": round(used.cpu_seconds, 2),
        "seconds_per_gb": round(used.cpu_seconds / moved, 2),
        "peak_mb": round(used.peak_bytes / 1e6),
        "read_mb": round(int(counted["rchar"]) / 1e6),
        "least_read_mb": round(least["read"] / 1e6),
        "written_mb": round(int(counted["wchar"]) / 1e6),
        "least_written_mb": round(least["written"] / 1e6),
    }


def floor(recipe: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of all tensors that the output is made of, each once, and those of the output."""
    made = plan(recipe) if "merge_method" in recipe else plan_mixture(recipe)
    inputs = {}
    for tensor in made.tensors:
        for info in tensor.inputs:
            for part in info.stored or (info,):
                # a router's values are in no file
                if tensor.role != "router":
                    inputs[part.file, part.name] = part.nbytes
    return {"read": sum(inputs.values()), "written": sum(tensor.nbytes for tensor in made.tensors)}


if __name__ == "__main__":
    raise SystemExit(main())
