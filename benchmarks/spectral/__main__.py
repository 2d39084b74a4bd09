"""`python -m benchmarks.spectral [options]`: Iso-C, Iso-CTS, TSV-M, WUDI and SVC, beside FusionBench.

Both sides merge the same task vectors in one process, in turns. With one thread both use one; with more, Merganser
merges as many matrices at a time, one thread each, as its engine does, and FusionBench one after the other with all
threads, as it does. Seconds are per matrix. WUDI's 300 steps of Adam are extrapolated from a few, on both sides; beside
them stands the closed form that Merganser takes by default.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..merge import hardware
from . import peer
from .cases import METHODS, PUBLISHED_STEPS, Case, best, error, extrapolated, ours, run_alone, run_side_by_side
from .references import reference


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        place = peer.folder(options.peer_folder)
    except peer.PeerError as failure:
        sys.stderr.write(f"bench: {failure}\n")
        return 2
    hardware.complain_if_busy()
    folder = options.folder or Path(os.environ.get("MERGANSER_BENCH") or Path.home() / ".cache/merganser/bench")
    results: dict[str, Any] = {
        "hardware": hardware.describe(Path.cwd()) | {"fusion_bench": peer.version(place)},
        "threads": options.threads,
        "runs": options.runs,
        "wudi_steps": options.steps,
        "cases": [],
    }
    theirs = peer.load(place)
    for shape in options.shapes:
        for models in options.models:
            for method in options.methods:
                found = measure(Case(method, shape, models), theirs[method], options, folder / "spectral")
                results["cases"].append(found)
                sys.stdout.write(_line(found) + "\n")
                sys.stdout.flush()
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(
    case: Case, theirs: Callable[[int], peer.Merge], options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Measure both sides of a case in turns; take the best of the runs."""
    vectors, threads = case.vectors(), options.threads
    sides: dict[str, Callable[[int], peer.Merge]] = {
        "merganser": lambda n: ours(case.method, n),
        "fusion_bench": theirs,
    }
    found: dict[str, Any] = {
        "method": case.method,
        "shape": list(case.shape),
        "models": case.models,
        "load_before": hardware.load()[0],
    }
    results = {}
    for name, side in sides.items():
        run = run_side_by_side if name == "merganser" else run_alone
        found[name], results[name] = best([run(side(options.steps), vectors, threads) for _ in range(options.runs)])
        if case.method == "wudi":
            first, _ = best([run(side(1), vectors, threads) for _ in range(options.runs)])
            found[name]["published_steps"] = extrapolated(first, found[name], options.steps)
    compared = {name: found[name].get("published_steps", found[name]) for name in sides}
    for key in ("seconds", "cpu_seconds"):
        found[f"ratio_of_{key}"] = compared["fusion_bench"][key] / compared["merganser"][key]
    if case.method == "wudi":
        found["filter"], _ = best([run_side_by_side(ours("wudi", None), vectors, threads)])
        found["ratio_to_filter"] = compared["fusion_bench"]["seconds"] / found["filter"]["seconds"]
    if options.reference:
        torch.set_num_threads(os.cpu_count() or 1)
        expected = reference(case.method, vectors, case.key, folder, steps=options.steps)
        for name, result in results.items():
            found[name]["error"] = error(result, expected)
    return found


def _line(found: dict[str, Any]) -> str:
    mine, their = found["merganser"], found["fusion_bench"]
    ratios = f"ratio {found['ratio_of_seconds']:.2f} (processor {found['ratio_of_cpu_seconds']:.2f})"
    text = (
        f"{found['method']:8s} {found['shape'][0]} x {found['shape'][1]}, {found['models']} models: "
        f"{mine['seconds']:.2f} s, FusionBench {their['seconds']:.2f} s, {ratios}"
    )
    if "filter" in found:
        text += (
            f" with {PUBLISHED_STEPS} steps; filter {found['filter']['seconds']:.2f} s, {found['ratio_to_filter']:.0f}"
        )
    if "error" in mine:
        text += f"; errors {mine['error']:.1e} and {their['error']:.1e}"
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spectral", description=__doc__, allow_abbrev=False)
    parser.add_argument("--methods", type=_names, default=METHODS, metavar="NAME,...", help="merge methods")
    parser.add_argument("--shapes", type=_shapes, default=[(2048, 2048), (2048, 5632)], metavar="MxN,...")
    parser.add_argument("--models", type=_counts, default=[4, 8], metavar="N,...", help="numbers of models")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of both sides (default: 1)")
    parser.add_argument("--runs", type=int, default=2, metavar="N", help="how often; the best counts (default: 2)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps of Adam for WUDI (default: 3 of 300)")
    parser.add_argument("--no-reference", dest="reference", action="store_false", help="no errors: times only")
    parser.add_argument("--peer-folder", type=Path, metavar="DIR", help=f"FusionBench (default: ${peer.VARIABLE})")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for references (default: $MERGANSER_BENCH)")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path(__file__).parent / "results" / "spectral.json")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name}: not measured; there are {', '.join(METHODS)}")
    return names


def _shapes(text: str) -> list[tuple[int, int]]:
    try:
        return [(int(m), int(n)) for m, n in (shape.split("x") for shape in text.split(","))]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be MxN,...") from None


def _counts(text: str) -> list[int]:
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be whole numbers") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
