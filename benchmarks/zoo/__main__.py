"""`python -m benchmarks.zoo tiny|real`: make a zoo of models, or what is missing of it."""

import argparse
import sys
from pathlib import Path

from . import ZOOS, default_folder
from .sources import SourceError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo", description="Make a zoo of small models to merge."
    )
    parser.add_argument(
        "zoo", choices=ZOOS, help="tiny: from scratch, about two minutes; real: SmolLM2-135M and experts"
    )
    parser.add_argument("--out", type=Path, help="folder of the zoo (default: the user's cache folder)")
    parser.add_argument("--threads", type=int, default=2, help="worker processes, one thread each (default 2)")
    options = parser.parse_args(arguments)
    folder = (options.out or default_folder(options.zoo)).resolve()
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    try:
        from . import tiny

        tiny.make(folder, options.threads)
    except (SourceError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished models are kept, the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
