"""`python -m benchmarks.merge [methods|peer|max-memory|many-tensors|plan-70b|scaling|kills|all|chart|peer-setup] [options]`.

Without a name, the methods. Settings come from config.json; options replace them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import chart, hardware, peer
from .recipes import METHODS
from .scenarios import SCENARIOS, shown, size_in_bytes
from .session import Report, Session, default_folder

_HERE = Path(__file__).parent
_NAMES = (*SCENARIOS, "all", "chart", "peer-setup")


def main(arguments: list[str]) -> int:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["methods", *arguments]
    options = _parser().parse_args(arguments)
    folder = (options.folder or default_folder()).resolve()
    place = peer.folder(folder, options.peer_folder)
    if options.what == "methods" and options.limit:
        options.what = "max-memory"
    if options.what == "chart":
        docs = _HERE.parents[1] / "docs"
        images = options.out / "images" if options.out else docs / "images"
        chart.draw(options.out or _HERE / "results", images, docs / "speed.md" if options.write else None)
        return 0
    with_peer = options.peer or options.what == "peer"
    try:
        if options.what == "peer-setup":
            peer.set_up(place)
            return 0
        if with_peer:
            peer.check(place)
    except peer.PeerError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 2
    configs = json.loads((_HERE / "config.json").read_text(encoding="utf-8"))
    every = [name for name in SCENARIOS if with_peer or name != "peer"]
    names = every if options.what == "all" else [options.what]
    return max(_measure(name, configs[name], options, folder, place if with_peer else None) for name in names)


def _measure(name: str, config: dict[str, Any], options: argparse.Namespace, folder: Path, place: Path | None) -> int:
    given = {key: getattr(options, key) for key in ("size", "models", "runs", "methods", "limit")}
    known = {key: value for key, value in given.items() if value is not None and key in config}
    if isinstance(config.get("models"), list):
        known.pop("models", None)
    config = {**config, **known, **dict(options.set)}
    # of everything, only the methods are worth the time twice; where everything is measured, a scenario of its own has
    # mergekit: what it leaves of the page cache would be part of our times
    cold = options.cold and (name == "methods" or options.what != "all")
    if name not in (("peer",) if options.what == "all" else ("peer", "methods")):
        place = None
    config |= {"cold": cold, "threads_given": options.threads, "peer": place is not None}
    folder.mkdir(parents=True, exist_ok=True)
    hardware.complain_if_busy()
    session = Session(
        folder,
        runs=config["runs"],
        threads=options.threads,
        cold=cold,
        peer=place,
        peer_once_above=config.get("peer_once_above", 60.0),
        timeout=options.timeout,
    )
    file = options.out if options.out and options.what != "all" else (options.out or _HERE / "results") / f"{name}.json"
    report = Report(file, name, shown(config), hardware.describe(folder, session.peer))
    sys.stdout.write(f"{name}: results go to {file}\n")
    SCENARIOS[name](session, report, config)
    return 1 if report.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=_NAMES, help="what to measure (default: methods)")
    parser.add_argument("--size", type=float, metavar="B", help="billions of parameters of each model")
    parser.add_argument("--models", type=int, metavar="N", help="number of experts")
    parser.add_argument("--methods", type=_methods, metavar="NAME,...", help="merge methods")
    parser.add_argument("--runs", type=int, metavar="N", help="how often each merge is measured")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (default: as the tools choose)")
    parser.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="KEY=JSON", help="any setting of config.json"
    )
    parser.add_argument("--max-memory", dest="limit", type=_limit, metavar="SIZE", help="for max-memory: the limit")
    parser.add_argument("--cold", action="store_true", help="also with the inputs out of the page cache")
    parser.add_argument("--peer", action="store_true", help="mergekit beside us, for methods")
    parser.add_argument("--peer-folder", type=Path, metavar="DIR", help="mergekit's virtual environment")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for models and outputs (default: $MERGANSER_BENCH)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file; for all and chart, their folder")
    parser.add_argument("--write", action="store_true", help="for chart: put the tables into docs/speed.md")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="S", help="seconds a merge may take")
    return parser


def _methods(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"{name}: not measured; there are {', '.join(METHODS)}")
    return names


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text}: must be KEY=JSON: {error}") from None


def _limit(text: str) -> str:
    size_in_bytes(text)
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
