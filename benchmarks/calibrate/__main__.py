"""`scripts/bench calibrate [time] [memory] [regmean] [options]`: what calibration takes.

time: `merganser calibrate` (Gram matrices) beside an ordinary forward of the same tokens in transformers.
memory: its peak on a random model whose blocks are a thirtieth of it, and on one with twice as many blocks.
large: its peak and its time on 512 tokens and the blocks of a model of 7 billion parameters, four and eight of its 32.
regmean: `merganser merge` with RegMean of four experts beside FusionBench's RegMean, and the errors of both against float64.

Every command runs as a process of its own with one thread. Seconds are those of the processor, with all that a command does
before and after its arithmetic.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..merge import hardware
from ..spectral.peer import VARIABLE, PeerError
from . import large, memory, regmean, timing

_HERE = Path(__file__).parent

PARTS: Mapping[str, Callable[[Path, Path, argparse.Namespace], dict[str, Any]]] = {
    "time": timing.measure,
    "memory": memory.measure,
    "large": large.measure,
    "regmean": regmean.measure,
}


def main(arguments: list[str]) -> int:
    """Measure the parts that are asked for, and keep what the result file has of the others."""
    options = _parser().parse_args(arguments)
    zoo = Path.home() / ".cache/merganser/zoo/shipped"
    if not zoo.is_dir():
        sys.stderr.write("bench: the zoo is not there; scripts/demo makes it\n")
        return 2
    hardware.complain_if_busy()
    found: dict[str, Any] = {}
    if options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
    for part in options.parts or PARTS:
        folder = Path(tempfile.mkdtemp(prefix=f"calibrate-{part}-", dir=options.folder))
        try:
            row = {"load_before": hardware.load()[0], **PARTS[part](zoo, folder, options)}
        except PeerError as failure:
            sys.stderr.write(f"bench: {failure}\n")
            return 2
        finally:
            shutil.rmtree(folder)
        found[part] = {"hardware": hardware.describe(options.folder or Path(tempfile.gettempdir())), **row}
        sys.stdout.write(f"{part} {json.dumps(row, indent=1)}\n")
        sys.stdout.flush()
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench calibrate",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", type=_part, metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=2, metavar="N", help="how often times are taken; the best counts")
    parser.add_argument("--sequences", type=int, default=16, metavar="N", help="of 256 tokens per expert, for regmean")
    parser.add_argument("--layers", type=int, metavar="N", help="the first of every model, for regmean (default: all)")
    parser.add_argument("--peer-folder", type=Path, metavar="DIR", help=f"FusionBench (default: ${VARIABLE})")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where models and outputs lie meanwhile: up to 4 GB, for large 10"
    )
    parser.add_argument("--out", type=Path, default=_HERE / "results.json", metavar="FILE")
    return parser


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text}: not measured; there are {', '.join(PARTS)}")
    return text


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
