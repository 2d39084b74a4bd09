"""Which inputs an output was made from, and the licences that they state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.formats.gguf.header import read_gguf_header
from ..checkpoint.hub import is_hub_id
from ..errors import CheckpointError, MergeError
from ..recipe import load_recipes
from . import hub
from .front_matter import front_matter

__all__ = ["InputLicence", "common_licence", "input_licences"]

_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_LONGEST = 100


@dataclass(frozen=True, slots=True)
class InputLicence:
    """An input and its licence.

    Args:
        model: The model or adapter, as the recipe names it; of a folder, the last part of its path.
        on_hub: Whether it is a model of the Hub.
        licence: The licence, as the Hub names it; None if it is not known.
        source: Where it was found, or why it was not.
    """

    model: str
    on_hub: bool
    licence: str | None
    source: str


def input_licences(record: Mapping[str, Any]) -> list[InputLicence]:
    """Return every input of an output once, with its licence.

    Args:
        record: The output's run record.
    """
    places: dict[str, Path] = {}
    for entry in record.get("inputs") or ():
        if isinstance(entry, dict) and isinstance(entry.get("path"), str) and isinstance(entry.get("model"), str):
            places.setdefault(entry["model"], Path(entry["path"]))
    found: dict[tuple[str, str | None], InputLicence] = {}
    for path, revision in _inputs(record):
        if (path, revision) not in found:
            found[path, revision] = _licence(path, revision, places.get(path))
    return list(found.values())


def common_licence(found: Sequence[InputLicence]) -> str | None:
    """Return the licence that all inputs have; None if they have several, or one is not known."""
    names = {each.licence for each in found}
    return names.pop() if len(names) == 1 else None


def _inputs(record: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yield path or id, and revision, of every model and adapter; results of a recipe's own stages are none."""
    text = record.get("recipe")
    try:
        recipes = load_recipes(text) if isinstance(text, str) and "\n" in text else []
    except MergeError:
        recipes = []
    stages = {recipe.name for recipe in recipes}
    for recipe in recipes:
        for reference in recipe.references():
            if reference.path not in stages:
                yield reference.path, reference.revision
            if reference.lora is not None and reference.lora not in stages:
                yield reference.lora, reference.lora_revision
    if not recipes:
        for model in record.get("models") or ():
            if isinstance(model, str):
                yield model, None


def _licence(path: str, revision: str | None, file: Path | None) -> InputLicence:
    folder = Path(path).expanduser()
    # a folder of this name may be gone by now
    was_folder = file is not None and folder in (file, *file.parents)
    if not folder.exists() and not was_folder and is_hub_id(path):
        try:
            stated = hub.model_licence(path, revision)
        except CheckpointError as error:
            return InputLicence(path, True, None, str(error))
        return InputLicence(path, True, stated, "its page on the Hub" if stated else "its page on the Hub states none")
    name = Path(path).name or path
    file = folder if folder.is_file() else file
    folder = folder if folder.is_dir() else folder.parent
    if not folder.is_dir():
        return InputLicence(name, False, None, "the folder is no longer there")
    stated = front_matter(_text(folder / "README.md"))[0].get("license")
    if isinstance(stated, str) and 0 < len(stated) <= _LONGEST:
        return InputLicence(name, False, stated.strip().lower(), "its README.md")
    if file is not None and file.name.endswith(".gguf") and (stated := _of_gguf(file)):
        return InputLicence(name, False, stated, "its metadata")
    licence_file = next((each for each in _LICENCE_FILES if (folder / each).is_file()), None)
    return InputLicence(name, False, None, f"see its {licence_file}" if licence_file else "no README.md states one")


def _of_gguf(file: Path) -> str | None:
    try:
        stated = read_gguf_header(file).fields.get("general.license")
    except MergeError:
        return None
    return stated.lower() if isinstance(stated, str) and 0 < len(stated) <= _LONGEST else None


def _text(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", errors="replace") as handle:
            return handle.read(1 << 20)
    except OSError:
        return ""
