"""`python -m benchmarks.search [trial|waves|cma|replay|all|table] [options]`: measure searches on the shipped zoo.

`trial` compares a trial with writing its merge to disk and loading it. `waves` carries out the same studies with and without
waves of items. `cma` compares CMA-ES over the weights of four experts with as many random trials, and `replay` does both on
quadratics, one for each item, fitted to all trials so far, which takes no models. Items are few and short, so that a trial takes seconds. Scores
are kept in the work folder, and studies continue. Results go to results.json, and `table` writes docs/search.md.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.merge import hardware
from benchmarks.zoo import default_folder, shipped

from . import studies, tables, trial
from .field import open_field

_HERE = Path(__file__).parent
_PARTS = ("trial", "waves", "cma", "replay")


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    if options.what != "table":
        zoo = shipped.unpacked(options.zoo)
        known["hardware"] = hardware.describe(zoo.folder) | {"threads": options.threads}
        for part in _PARTS if options.what == "all" else (options.what,):
            known |= _measure(part, options)
            options.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        if not options.keep:
            shutil.rmtree(options.work, ignore_errors=True)
    else:
        tables.write(known, _HERE.parents[1] / "docs" / "search.md")
    sys.stdout.write(tables.table(known) + "\n")
    return 0


def _measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    zoo = shipped.unpacked(options.zoo)
    with open_field(zoo, options.work, options.windows, options.context) as field:
        if part == "trial":
            return {"trial": trial.measure(field, options.work)}
        if part == "waves":
            return {
                f"waves-{sampler}": studies.waves(field, sampler, options.wave_seeds, options.trials)
                for sampler in options.samplers
            }
        if part == "replay":
            return {"replay": studies.replay(field, options.samplers, options.replays, options.trials)}
        return {"cma": studies.cma(field, options.seeds, options.trials)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=[*_PARTS, "all", "table"], nargs="?", default="all")
    parser.add_argument("--windows", type=int, default=8, help="windows of each tune text for trials; waves need 8")
    parser.add_argument("--context", type=int, default=32, help="tokens of a window")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of cma")
    parser.add_argument("--trials", type=int, default=60, help="trials of a study")
    parser.add_argument("--wave-seeds", type=int, default=1, help="seeds of waves, for each sampler")
    parser.add_argument("--replays", type=int, default=20, help="seeds of replay")
    parser.add_argument(
        "--samplers", type=lambda text: text.split(","), default=["random", "cma"], help="those of waves"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--zoo", type=Path, help="folder of the shipped zoo")
    parser.add_argument("--work", type=Path, default=default_folder("shipped").parent / "search-bench")
    parser.add_argument("--keep", action="store_true", help="keep the work folder, so that studies continue")
    parser.add_argument("--out", type=Path, default=_HERE / "results.json")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
