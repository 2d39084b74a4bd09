"""The key `data` of a recipe: on which data the models are calibrated, with keys like the options of `calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...statistics.choice import BATCH_TOKENS, COUNTED, LABELS, Choice, Dataset
from ..document.place import Entry, Place

__all__ = ["DATA_KEYS", "NO_SOURCE", "Data", "DataFields", "make_data", "names_source", "read_data_fields"]

DATA_KEYS = ("files", "dataset", "subset", "split", "sequences", "length", "seed", "tokens", "labels", "batch_tokens")
_OF_DATASETS = ("subset", "split")
_SOURCES = ("files", "dataset", *_OF_DATASETS)

DataFields = dict[str, Any]
"""Values of some of the keys, by key."""

NO_SOURCE = "names neither files nor a dataset; give one, here or for each model"


@dataclass(frozen=True, slots=True)
class Data:
    """Data to calibrate a model on.

    Args:
        source: Files, or a data set.
        choice: Which part of it.
        batch_tokens: Largest number of tokens that the model reads at once.
        place: Where the recipe says it.
        own: Whether it is said for one model alone.
        labels: The tokens whose likelihood is the loss, `data` or `sampled`; None if the recipe does not say it.
    """

    source: tuple[str, ...] | Dataset
    choice: Choice
    batch_tokens: int
    place: Place
    own: bool
    labels: str | None = None


def read_data_fields(entry: Entry) -> DataFields:
    """Read one file, a list of files, or a mapping.

    Raises:
        RecipeError: It is none of these, a key is unknown, or a value is not allowed.
    """
    if not isinstance(entry.value, dict):
        return {"files": _files(entry)}
    fields = entry.mapping(DATA_KEYS)
    if not fields:
        raise entry.error("names no data; give files or a dataset")
    if "files" in fields and "dataset" in fields:
        raise fields["dataset"].error("give files or a dataset, not both")
    for key in _OF_DATASETS:
        if key in fields and "files" in fields:
            raise fields[key].error(f"{key} is for a dataset, and here are files; leave it out")
    found: DataFields = {}
    for key in ("dataset", *_OF_DATASETS):
        if key in fields:
            found[key] = fields[key].text()
    for key, lowest in (("sequences", 1), ("length", 2), ("seed", 0), ("batch_tokens", 1)):
        if key in fields:
            found[key] = fields[key].whole_number(lowest)
    if "files" in fields:
        found["files"] = _files(fields["files"])
    for key, allowed in (("tokens", COUNTED), ("labels", LABELS)):
        if key in fields:
            found[key] = fields[key].choice(allowed)
    return found


def names_source(fields: DataFields) -> bool:
    """Return whether they name files or a data set, and not only how these are used."""
    return "files" in fields or "dataset" in fields


def make_data(entry: Entry, common: DataFields | None, own: DataFields | None) -> Data:
    """Return the data of one model.

    Args:
        entry: What holds the key.
        common: What the recipe says for all models.
        own: What it says for this model: it comes first, and other files or another data set replace those for all.

    Raises:
        RecipeError: Neither names files or a data set.
    """
    given = dict(common or {})
    if own and names_source(own):
        given = {key: value for key, value in given.items() if key not in _SOURCES}
    elif own and "files" in given and any(key in own for key in _OF_DATASETS):
        raise entry.error("subset and split are for a dataset, and the data for all models are files")
    given |= own or {}
    if "dataset" in given:
        source: tuple[str, ...] | Dataset = Dataset(given["dataset"], given.get("subset"), given.get("split", "train"))
    elif "files" in given:
        files: tuple[str, ...] = given["files"]
        twice = next((name for name in files if files.count(name) > 1), None)
        if twice is not None:
            raise entry.error(f"names {twice} twice; give each file once")
        source = files
    else:
        raise entry.error(NO_SOURCE)
    choice = Choice(given.get("sequences"), given.get("length"), given.get("seed", 0), given.get("tokens", COUNTED[0]))
    return Data(
        source, choice, given.get("batch_tokens", BATCH_TOKENS), entry.place, own is not None, given.get("labels")
    )


def _files(entry: Entry) -> tuple[str, ...]:
    items = entry.items() if isinstance(entry.value, list) else [entry]
    return tuple(item.text() for item in items)
