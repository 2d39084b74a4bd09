"""Compare the time that plans say with the time that merges take: `python -m benchmarks.plan [--methods NAME,...] [--out FILE]`.

Results are kept in FILE, by recipe and size, and all that it holds are printed as the table of docs/speed.md.

Every recipe is planned as on a machine where nothing was merged before, merged, and planned once more. On a busy machine the
wall time says nothing, so the time that counts is that of the processor, on one thread: on a quiet machine both are the same.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..merge import hardware
from ..merge.measure import run

_HERE = Path(__file__).parent
_EXPERTS = ("haskell", "maths", "medicine")
_WEIGHT = round(1 / len(_EXPERTS), 6)
_SMALLER = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 24}
"""The second size, in the shape of the first: 6 heads, 2 of them for keys and values; 57 million parameters."""

BAR = 1.5

# parameters of every model, parameters of the method; whether the base is an input; tokens of data per model
RECIPES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], bool, bool]] = {
    "linear": ({"weight": _WEIGHT}, {}, False, False),
    "karcher": ({}, {}, False, False),
    "model_stock": ({}, {}, True, False),
    "ties": ({"weight": _WEIGHT, "density": 0.5}, {}, True, False),
    "dare_ties": ({"weight": _WEIGHT, "density": 0.5}, {}, True, False),
    "breadcrumbs": ({"weight": _WEIGHT, "density": 0.9, "gamma": 0.01}, {}, True, False),
    "della": ({"weight": _WEIGHT, "density": 0.5, "epsilon": 0.1}, {}, True, False),
    "iso_c": ({}, {}, True, False),
    "tsv_m": ({}, {}, True, False),
    "wudi": ({}, {}, True, False),
    "optmerge": ({}, {}, True, False),
    "regmean": ({}, {}, True, True),
    "regmean_plus": ({}, {}, True, True),
    "fisher": ({}, {}, True, True),
    "expert_merging": ({}, {"steps": 5}, True, True),
}


def main() -> int:
    """Measure, and print a line per recipe and size."""
    parser = argparse.ArgumentParser(prog="scripts/bench plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[*RECIPES], metavar="NAME,...")
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=["57M", "135M"], metavar="SIZE,...")
    parser.add_argument("--out", type=Path, default=_HERE / "results.json", metavar="FILE")
    parser.add_argument("--table", action="store_true", help="Print the table, and measure nothing.")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    if not options.table:
        rows = measure_all(options, rows)
    sys.stdout.write(table(rows))
    return int(any(not 1 / BAR <= row["ratio"] <= BAR for row in rows))


def measure_all(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure what was asked for, print and keep it; return it with the rows of other recipes and sizes.

    Raises:
        SystemExit: The zoo is not there.
    """
    zoo = Path.home() / ".cache/merganser/zoo/shipped"
    if not zoo.is_dir():
        sys.stderr.write("bench: the zoo is not there; scripts/demo makes it\n")
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            models = zoo if size == "135M" else make_smaller(zoo, Path(folder) / "models")
            for name in options.methods:
                row = {"method": name, "size": size, **measure(name, models, zoo / "texts", Path(folder))}
                rows = [each for each in rows if (each["method"], each["size"]) != (name, size)] + [row]
                sys.stdout.write(f"{json.dumps(row)}\n")
                sys.stdout.flush()
                found = {"machine": hardware.describe(Path(folder)), "bar": BAR, "rows": rows}
                options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of docs/speed.md: seconds of first plans and of merges, and their ratio, by recipe and size."""
    sizes = {"57M": "57 M", "135M": "135 M"}
    known = {(row["method"], row["size"]): row for row in rows}
    heads = [head for size in sizes.values() for head in (f"{size}: plan", "merge", "ratio")]
    lines = ["| recipe | " + " | ".join(heads) + " |", "| --- |" + " --: |" * len(heads)]
    for name in RECIPES:
        found = [known.get((name, size)) for size in sizes]
        if any(found):
            cells = [cell for row in found for cell in _cells(row)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    return f"{row['planned']:.1f}", f"{row['processor_seconds']:.1f}", f"{row['ratio']:.2f}"


def measure(name: str, models: Path, texts: Path, folder: Path) -> dict[str, Any]:
    """Plan, merge, and plan again; ratios are the time that the plan says over the time of the processor."""
    file, out, cache = folder / "recipe.json", folder / "out", folder / "cache"
    file.write_text(json.dumps(recipe(name, models, texts)), encoding="utf-8")
    shutil.rmtree(cache, ignore_errors=True)
    planned = plan(file, folder, cache)
    command = [sys.executable, "-m", "merganser", "merge", str(file), str(out), "--threads", "1", "--quiet"]
    usage = run(command, folder / "log", environment=surroundings(cache))
    shutil.rmtree(out)
    again = plan(file, folder, cache)
    return {
        "planned": round(planned, 2),
        "processor_seconds": round(usage.cpu_seconds, 2),
        "wall_seconds": round(usage.seconds, 2),
        "elsewhere": round(usage.elsewhere, 2),
        "ratio": round(planned / usage.cpu_seconds, 3),
        "ratio_after": round(again / usage.cpu_seconds, 3),
    }


def plan(file: Path, folder: Path, cache: Path) -> float:
    """Return the time that a plan says, seconds."""
    log = folder / "plan.json"
    command = [sys.executable, "-m", "merganser", "plan", str(file), "--threads", "1", "--json"]
    run(command, log, environment=surroundings(cache))
    text = log.read_text(encoding="utf-8")
    (stage,) = json.loads(text[text.index("{\n") :])["stages"]
    return float(stage["seconds"] + sum(own["seconds"] for own in stage["calibrations"]))


def surroundings(cache: Path) -> dict[str, str]:
    """Return variables for one thread, and a cache without what earlier merges kept."""
    return {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}


def recipe(name: str, models: Path, texts: Path) -> dict[str, Any]:
    """Return a recipe of three experts."""
    each, shared, with_base, with_data = RECIPES[name]
    document: dict[str, Any] = {"merge_method": name, "dtype": "bfloat16"}
    document["models"] = [
        {
            "model": str(models / "experts" / expert),
            **({"parameters": dict(each)} if each else {}),
            **({"data": str(texts / f"{expert}.train.txt")} if with_data else {}),
        }
        for expert in _EXPERTS
    ]
    document |= {"base_model": str(models / "base")} if with_base else {}
    document |= {"parameters": dict(shared)} if shared else {}
    return document | ({"data": {"sequences": 4, "length": 256}} if with_data else {})


def make_smaller(zoo: Path, folder: Path) -> Path:
    """Make models of random numbers in a smaller shape, with the tokenizer and the embeddings' rows of the zoo."""
    generator = torch.Generator().manual_seed(0)
    config = json.loads((zoo / "base" / "config.json").read_text(encoding="utf-8")) | _SMALLER
    width = config["head_dim"] if config.get("head_dim") else 64
    heads = config["hidden_size"] // width
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads // 3}
    sides = {576: config["hidden_size"], 1536: config["intermediate_size"], 192: width * (heads // 3)}
    layers = config["num_hidden_layers"]
    shapes = {
        name: [sides.get(side, side) for side in tensor.shape]
        for name, tensor in load_file(zoo / "base" / "model.safetensors").items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    base = {
        name: torch.ones(shape) if "norm" in name else 0.05 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    for part in ("base", *(f"experts/{expert}" for expert in _EXPERTS)):
        own = base if part == "base" else {name: value + _change(value, generator) for name, value in base.items()}
        (folder / part).mkdir(parents=True)
        save_file({name: value.bfloat16() for name, value in own.items()}, folder / part / "model.safetensors")
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for file in (zoo / "base").glob("*token*"):
            shutil.copy(file, folder / part)
    return folder


def _change(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a full task vector with a spectrum that falls, as fine-tunes have."""
    if value.dim() != 2:
        return torch.zeros_like(value)
    rank = 32
    left, right = (
        torch.randn(len(value), rank, generator=generator),
        torch.randn(rank, value.shape[1], generator=generator),
    )
    falling = 0.003 * torch.arange(1, rank + 1) ** -0.5
    return (left * falling) @ right + 0.0003 * torch.randn(value.shape, generator=generator)


if __name__ == "__main__":
    sys.exit(main())
