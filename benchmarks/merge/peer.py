"""mergekit, in a virtual environment of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REQUIREMENTS = ("torch==2.13.0", "mergekit==0.1.5")

_SHOWN = ("mergekit", "torch", "transformers", "safetensors")


class PeerError(RuntimeError):
    """mergekit is not there, or not the version that is compared with."""


def folder(cache: Path, given: Path | None = None) -> Path:
    """Return where the environment lies: as given, `$MERGANSER_PEER`, or in the benchmark's folder."""
    return given or Path(os.environ.get("MERGANSER_PEER") or cache / "peer")


def set_up(place: Path) -> None:
    """Make the environment; does nothing where it is whole."""
    try:
        check(place)
        return
    except PeerError:
        pass
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    # torch first and by its exact version: what else needs it then takes this one
    for requirement in REQUIREMENTS:
        subprocess.run([str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", requirement], check=True)
    check(place)


def check(place: Path) -> None:
    """Refuse an environment that is not as it must be.

    Raises:
        PeerError: It is missing, or has other versions.
    """
    if not (place / "bin" / "mergekit-yaml").exists():
        raise PeerError(
            f"{place}: no mergekit here; make it with scripts/bench peer-setup, or name it in MERGANSER_PEER"
        )
    found = versions(place)
    for requirement in REQUIREMENTS:
        name, _, wanted = requirement.partition("==")
        if found[name].partition("+")[0] != wanted:
            raise PeerError(f"{place}: has {name} {found[name]}, the comparison is with {wanted}")


def versions(place: Path) -> dict[str, str]:
    """Return the versions in the environment."""
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {_SHOWN!r}}}))"
    answer = subprocess.run([str(place / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(answer.stdout)
    return found


def command(place: Path, recipe: Path, out: Path) -> Sequence[str]:
    """Return the command of a merge, with mergekit's own defaults."""
    return [str(place / "bin" / "python"), str(place / "bin" / "mergekit-yaml"), str(recipe), str(out), "--quiet"]
