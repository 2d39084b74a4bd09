"""A folder of models and outputs, each made by a command of `merganser`."""

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ADAPTERS = Path(__file__).parents[1] / "adapters"
TASKS = ("haskell", "maths", "medicine", "middle_english")


class MakingError(RuntimeError):
    """A command of merganser failed."""


class Work:
    """What is made lies in one folder, and stays there: what is there already is not made again.

    Args:
        folder: The folder.
        zoo: The models that `scripts/demo` unpacks.
    """

    def __init__(self, folder: Path, zoo: Path) -> None:
        self.folder = folder
        self.base = zoo / "base"
        self.experts = {name: zoo / "experts" / name for name in TASKS}
        self.texts = {name: zoo / "texts" / f"{name}.train.txt" for name in TASKS}
        folder.mkdir(parents=True, exist_ok=True)

    def merge(self, name: str, recipe: Mapping[str, Any], verb: str = "merge") -> Path:
        """Run a recipe, and return its output."""
        out = self.folder / name
        if not out.exists():
            file = self.folder / f"{name}.yaml"
            file.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
            self.run(verb, str(file), str(out))
        return out

    def command(self, name: str, verb: str, *arguments: Path | str, out: str = "--out") -> Path:
        """Run a command that writes a folder of this name; the folder follows the option `out`, or is the last argument."""
        target = self.folder / name
        if not target.exists():
            self.run(verb, *map(str, arguments), *([out] if out else []), str(target))
        return target

    def run(self, *arguments: str) -> None:
        """Run a command of `merganser`, in this process: its libraries are loaded once."""
        from merganser.cli import make_app

        said = io.StringIO()
        code: int | str | None = 0
        try:
            with contextlib.redirect_stderr(said):
                make_app(arguments[0])([*arguments, "--quiet"])
        except SystemExit as ended:
            code = ended.code
        if code:
            raise MakingError(f"merganser {arguments[0]}: {said.getvalue().strip()}")

    def made(self, name: str, write: Callable[[Path], None]) -> Path:
        """Return a folder that a function writes where it is missing."""
        target = self.folder / name
        if not target.exists():
            draft = self.folder / f".{name}"
            draft.mkdir(exist_ok=True)
            write(draft)
            draft.rename(target)
        return target
