"""`python -m benchmarks.inputs [omp|gguf|adapters] [options]`: the bars of what inputs of other kinds take.

`omp`: coefficients of new tokens, beside mergekit's `batch_omp` in an environment of its own, on the same matrices.
`gguf`: every tensor of a Q4_K file of 0.5 B read by two threads, beside the package gguf on one.
`adapters`: eight adapters of rank 16 for a base in the shape of a model of 7 B, merged into one adapter.
On a busy machine only processor seconds say something.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from ..merge import hardware
from ..merge.peer import PeerError
from . import adapters, omp, reading

_PARTS = {"omp": omp.measure, "gguf": reading.measure, "adapters": adapters.measure}


def main() -> int:
    """Measure, print, and write results/inputs.json."""
    parser = argparse.ArgumentParser(prog="scripts/bench inputs", description=__doc__, allow_abbrev=False)
    parser.add_argument("part", choices=[*_PARTS, "all"], nargs="?", default="all")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="tokens of omp, of 50,000")
    parser.add_argument("--runs", type=int, default=2, metavar="N", help="how often gguf is read; the best counts")
    parser.add_argument("--donor", type=Path, metavar="FILE", help="an embedding of omp (.npy); drawn by default")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[*adapters.RECIPES], metavar="NAME,...")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for files (default: $MERGANSER_BENCH)")
    parser.add_argument("--peer-folder", type=Path, metavar="DIR", help="mergekit (default: $MERGANSER_PEER)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json", metavar="FILE")
    options = parser.parse_args()
    cache = Path(os.environ.get("MERGANSER_BENCH") or Path.home() / ".cache/merganser/bench")
    options.folder = options.folder or cache / "inputs"
    options.folder.mkdir(parents=True, exist_ok=True)
    hardware.complain_if_busy()
    results: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for part in _PARTS if options.part == "all" else [options.part]:
        load = hardware.load()[0]
        try:
            found = _PARTS[part](options, cache)
        except PeerError as error:
            sys.stderr.write(f"bench: {error}\n")
            return 2
        results[part] = {"machine": hardware.describe(options.folder), "load_before": load, **found}
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(json.dumps({part: found}, indent=1) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
