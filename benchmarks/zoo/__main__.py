"""`python -m benchmarks.zoo tiny|real|ship`: make a zoo of models, or what is missing of it; copy out its adapters."""

import argparse
import sys
from pathlib import Path

from . import ZOOS, default_folder
from .sources import SourceError


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description="Make small models to merge.")
    parser.add_argument(
        "zoo",
        choices=[*ZOOS, "ship"],
        help="tiny: from scratch, two minutes; real: SmolLM2-135M, about an hour; ship: the real zoo's adapters, as files "
        "of the repository",
    )
    parser.add_argument("--out", type=Path, help="folder of the zoo (default: in the user's cache folder)")
    parser.add_argument("--threads", type=int, default=2, help="worker processes, one thread each (default 2)")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="real: make these only, such as experts/french")
    parser.add_argument("--steps", type=int, help="real: training steps, for a trial")
    options = parser.parse_args(arguments)
    folder = (options.out or default_folder("real" if options.zoo == "ship" else options.zoo)).resolve()
    for name in ("threads", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.zoo != "real" and (options.only or options.steps):
        parser.error("--only and --steps are for the real zoo")
    if options.steps and not options.out:
        parser.error("--steps needs --out, so that a trial does not take the place of the zoo")
    try:
        if options.zoo == "tiny":
            from . import tiny

            tiny.make(folder, options.threads)
        elif options.zoo == "ship":
            from . import shipped

            print(f"wrote {shipped.FOLDER}: {', '.join(shipped.ship(folder))}")
        else:
            from . import real

            real.make(folder, options.threads, options.only, options.steps)
    except (SourceError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished models are kept, the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
