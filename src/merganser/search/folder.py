"""The folder of a search: what it was begun with, its journals, and one recipe file per trial."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CheckpointError, OutputError
from ..evaluation.scoring.journal import Journal, SharedJournal
from ..files import write_whole
from ..jsonfile import os_reason, read_object
from .many.claims import Claims

KIND = "search"
FORMAT = 1

_SETTINGS = "search.json"
_RECIPES = "recipes"
_SCRATCH = "scratch"
_CLAIMS = "claims"


@dataclass(frozen=True)
class Folder:
    """The folder of a search.

    Args:
        path: The folder.
        journal: The table of items.
        claims: The processes that work on the search.
    """

    path: Path
    journal: Journal
    claims: Claims

    @property
    def trials(self) -> Path:
        """Optuna's journal of trials."""
        return self.path / "trials.log"

    @property
    def result(self) -> Path:
        """What was found."""
        return self.path / "result.json"

    @property
    def winner(self) -> Path:
        """The recipe that was found."""
        return self.path / "winner.yaml"

    @property
    def scratch(self) -> Path:
        """Folder for this process's merges that an external command reads."""
        return self.path / _SCRATCH / self.claims.name

    def sweep(self, *, own: bool = False) -> None:
        """Remove the merges of processes that were killed, and with `own` those of this one."""
        folder = self.path / _SCRATCH
        for each in [*folder.iterdir()] if folder.is_dir() else []:
            mine = each.name == self.claims.name
            if own if mine else not self.claims.lives(each.name):
                shutil.rmtree(each, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()

    def settings(self) -> dict[str, Any] | None:
        """Return what the search was begun with; None if it was not yet."""
        path = self.path / _SETTINGS
        return read_object(path) if path.exists() else None

    def check(self, settings: Mapping[str, Any]) -> None:
        """Check that a search is continued with what it was begun with.

        Args:
            settings: Plain data, by what people call it.

        Raises:
            OutputError: Something was different.
        """
        known, given = self.settings(), _plain(settings)
        if known is None:
            return
        for name in {**known, **given}:
            if known.get(name) != given.get(name):
                what = _difference(known.get(name), given.get(name))
                raise OutputError(
                    f"{self.path}: this search was begun with another {name}: {what}; give what it was begun with, or "
                    "another folder"
                )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Store what a search is begun with."""
        if self.settings() is None:
            write_whole(self.path / _SETTINGS, json.dumps(_plain(settings), indent=1, ensure_ascii=False) + "\n")

    def write_recipe(self, name: str, text: str) -> Path:
        """Write a recipe below `recipes`, and return its path."""
        path = self.path / _RECIPES / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
        return path


@contextlib.contextmanager
def open_folder(path: Path, *, shared: bool = False) -> Iterator[Folder]:
    """Make the folder of a search, or open one that is there.

    Args:
        path: The folder; its parent exists.
        shared: Whether other processes may have it open at the same time; otherwise it is locked.

    Raises:
        OutputError: It is something else, cannot be written, or another process has it for itself.
    """
    try:
        if os.path.lexists(path):
            _check_ours(path)
        elif not path.parent.is_dir():
            raise OutputError(f"{path}: there is no folder {path.parent}; make it first")
        made = not path.exists()
        path.mkdir(exist_ok=True)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path}: cannot be written: {os_reason(error)}") from None
    with (SharedJournal if shared else Journal)(path / "items.jsonl") as journal:
        folder = Folder(path, journal, Claims(path / _CLAIMS))
        folder.sweep()
        try:
            yield folder
        finally:
            folder.sweep(own=True)
            folder.claims.close()
            if made and folder.settings() is None and not (path / _CLAIMS).exists():
                # refused before it began
                shutil.rmtree(path, ignore_errors=True)


def _check_ours(path: Path) -> None:
    if not path.is_dir():
        raise OutputError(f"{path}: is a file; give the name of a folder")
    names = {each.name for each in path.iterdir()}
    # a search that was killed before it wrote its settings left these alone
    if not names - {"items.jsonl", "trials.log", "trials.log.lock", "texts", _SCRATCH, _CLAIMS}:
        return
    try:
        found = read_object(path / _SETTINGS) if _SETTINGS in names else {}
    except CheckpointError as error:
        raise OutputError(f"{path}: its {_SETTINGS} is damaged: {error}") from None
    if found.get("kind") != KIND:
        raise OutputError(f"{path}: exists and is not the folder of a search; choose another name")
    if found.get("format") != FORMAT:
        raise OutputError(f"{path}: is the folder of a search by another version of merganser; choose another name")


def key_of(recipe: str) -> str:
    """Return the key of a recipe in the table of items."""
    return f"recipe {xxhash.xxh3_128_hexdigest(recipe.encode())}"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": KIND, "format": FORMAT, **json.loads(json.dumps(settings))}


def _difference(known: object, given: object) -> str:
    if isinstance(known, dict) and isinstance(given, dict):
        for name in {**known, **given}:
            if known.get(name) != given.get(name):
                return f"{name} was {_brief(known.get(name))}, and is {_brief(given.get(name))}"
    return f"it was {_brief(known)}, and is {_brief(given)}"


def _brief(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:56]}..."
