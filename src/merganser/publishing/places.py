"""Paths of this machine in files that are published: they name users and folders, and are replaced by their last parts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointError, MergeError
from ..jsonfile import read_object
from ..wording import unique_names

__all__ = ["changed_texts", "hide", "places_in"]

_TEXTS = (".json", ".md", ".yaml", ".yml")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""Files whose texts are tokens: one that begins with a slash is not a path."""

_SPACES = re.compile(r"(?:\s|\\n)+")

_PARTS = 3
"""Fewest parts of a path that is replaced, the root among them; `/data` says nothing of a machine."""


def places_in(out: Path, names: Iterable[str], record: Mapping[str, Any]) -> list[str]:
    """Return the absolute paths that a run record, its recipe and the JSON files of an output name.

    Args:
        out: The output.
        names: Names of its files.
        record: The run record.

    Raises:
        CheckpointError: A file cannot be read.
    """
    found = {path for text in _texts(record) for path in _paths(text)}
    if isinstance(record.get("recipe"), str):
        found |= {path for text in _scalars(record["recipe"]) for path in _paths(text)}
    for name in names:
        if name.endswith(".json") and Path(name).name not in _VOCABULARIES:
            try:
                content = read_object(out / name)
            except MergeError:
                continue  # a list, or not JSON: it is not of our making
            found |= {path for text in _texts(content) for path in _paths(text)}
    return sorted(found)


def hide(places: Iterable[str]) -> Callable[[str], str]:
    """Return a function that replaces paths in a text by their last parts, and the home folder by `~`.

    A path within another one keeps what follows that one's name. Paths with the same name keep as many parents as tell
    them apart.

    Args:
        places: From `places_in`.
    """
    paths = [Path(place) for place in places]
    outer = [path for path in paths if not any(other != path and str(path).startswith(str(other)) for other in paths)]
    short = dict(zip(map(str, outer), unique_names([path.parts[1:] for path in outer]), strict=True))
    home = Path.home()
    if len(home.parts) >= _PARTS:
        short.setdefault(str(home), "~")
    # the same in JSON, which escapes either all but ASCII, or only quotes, backslashes and control characters
    for ascii_only in (True, False):
        escaped = [[json.dumps(text, ensure_ascii=ascii_only)[1:-1] for text in pair] for pair in short.items()]
        short = dict(escaped) | short
    # YAML breaks long values at spaces, and JSON writes a line break as \n
    short = {_SPACES.sub(" ", path): name for path, name in short.items()}
    patterns = [_SPACES.pattern.join(map(re.escape, path.split(" "))) for path in sorted(short, key=len, reverse=True)]
    pattern = re.compile("|".join(patterns) or r"(?!)")
    return lambda text: pattern.sub(lambda match: short[_SPACES.sub(" ", match[0])], text)


def changed_texts(out: Path, names: Iterable[str], hidden: Callable[[str], str]) -> dict[str, bytes]:
    """Return the contents of those files of an output that name paths, with other texts in their place.

    Args:
        out: The output.
        names: Names of its files.
        hidden: From `hide`.

    Raises:
        CheckpointError: A file cannot be read.
    """
    found = {}
    for name in names:
        if not name.endswith(_TEXTS) or Path(name).name in _VOCABULARIES:
            continue
        try:
            old = (out / name).read_bytes()
            new = hidden(old.decode()).encode()
        except UnicodeError:
            continue
        except OSError as error:
            raise CheckpointError(f"{out / name}: cannot be read: {error.strerror}") from None
        if new != old:
            found[name] = new
    return found


def _texts(value: object) -> Iterator[str]:
    """Yield all texts in a JSON document, keys as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(key)
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _scalars(text: str) -> Iterator[str]:
    """Yield all scalars of a recipe."""
    try:
        for event in yaml.parse(text):
            if isinstance(event, yaml.ScalarEvent):
                yield event.value
    except yaml.YAMLError:
        return


def _paths(text: str) -> Iterator[str]:
    """Yield a text if it is an absolute path; of `MODEL+ADAPTER` each."""
    for part in text.split("+"):
        if "\n" not in part and Path(part).is_absolute() and len(Path(part).parts) >= _PARTS:
            yield part.rstrip("/\\")
