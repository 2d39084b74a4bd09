"""Read the ids of tokens from a tokenizer's files."""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError
from ..jsonfile import MAX_JSON_BYTES, os_reason, read_file, read_object
from .sentencepiece import read_pieces

__all__ = ["Vocabulary", "read_vocabulary", "same_vocabulary"]

Spelling = Literal["text", "base64"]

_MOST_DIGITS = 12
_SPACE = re.compile(r"[ \t\n\r]*")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,12}\r?(\n|$)")


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a tokenizer and their ids.

    Attributes:
        tokens: The tokens by id.
        added: The ids of tokens added to the trained vocabulary, such as special tokens.
        file: The name of the file that holds the trained vocabulary.
        spelling: How a token is stored: as text, or as base64 of its bytes.
        numbered: Whether ids equal the rows of the embedding; classes that read sentencepiece files may shift them.
    """

    tokens: Mapping[int, str]
    added: frozenset[int]
    file: str
    spelling: Spelling = "text"
    numbered: bool = True

    def id_of(self, token: str) -> int | None:
        """Return the id of a token; None if it is not in the vocabulary."""
        return next((number for number, text in self.tokens.items() if text == token), None)


def read_vocabulary(files: Mapping[str, Path]) -> Vocabulary | None:
    """Read the vocabulary of a tokenizer.

    Args:
        files: The files of the tokenizer by name, such as "tokenizer.json"; other files are ignored.

    Returns:
        None if no file holds a vocabulary.

    Raises:
        CheckpointError: A file is damaged or too large, or its contents do not match its name.
    """
    name = _main_file(files)
    if name is None:
        return None
    found = _reader(name)(files[name])
    if found is None:
        return None
    added = _added_beside(files)
    tokens = {**added, **found.tokens}
    ids = found.added | (added.keys() - found.tokens.keys())
    return Vocabulary(tokens, frozenset(ids), name, found.spelling, found.numbered)


def same_vocabulary(first: Mapping[str, Path], second: Mapping[str, Path]) -> bool:
    """Return whether two tokenizers have the same vocabulary files, byte for byte; large files are not parsed.

    Args:
        first: The files of one tokenizer by name.
        second: The files of the other tokenizer by name.

    Raises:
        CheckpointError: A file is damaged.
    """
    name = _main_file(first)
    if name != _main_file(second):
        return False
    if name is None:
        return True
    try:
        same = filecmp.cmp(first[name], second[name], shallow=False)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {os_reason(error)}") from None
    return same and _added_beside(first) == _added_beside(second)


def _main_file(files: Mapping[str, Path]) -> str | None:
    """Return the name of the file that holds the vocabulary; of several, the one that transformers would load."""
    exact = [name for name in ("tokenizer.json", "vocab.json", "vocab.txt") if name in files]
    others = [n for suffix in (".model", ".spm", ".tiktoken") for n in sorted(files) if n.endswith(suffix)]
    return next(iter([*exact, *others]), None)


def _reader(name: str) -> Callable[[Path], Vocabulary | None]:
    readers: dict[str, Callable[[Path], Vocabulary | None]] = {
        "tokenizer.json": _read_tokenizers,
        "vocab.json": _read_table,
        "vocab.txt": _read_lines,
    }
    return readers.get(name, _read_binary)


def _added_beside(files: Mapping[str, Path]) -> dict[int, str]:
    """Return the tokens that added_tokens.json and tokenizer_config.json add to the vocabulary."""
    added: dict[int, str] = {}
    if (file := files.get("tokenizer_config.json")) is not None:
        entries = read_object(file).get("added_tokens_decoder")
        for key, entry in entries.items() if isinstance(entries, dict) else ():
            content = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(content, str) or not re.fullmatch(rf"\d{{1,{_MOST_DIGITS}}}", key, re.ASCII):
                raise CheckpointError(f"{file}: added_tokens_decoder must map ids to tokens with a content")
            added[int(key)] = content
    if (file := files.get("added_tokens.json")) is not None:
        added |= _by_id(read_object(file), str(file))
    return added


def _by_id(table: Any, where: str) -> dict[int, str]:
    """Invert a table from tokens to ids."""
    whole = isinstance(table, dict) and all(type(number) is int and number >= 0 for number in table.values())
    if not whole:
        raise CheckpointError(f"{where}: must map tokens to ids, which are whole numbers of at least 0")
    return {number: token for token, number in table.items()}


def _read_table(file: Path) -> Vocabulary:
    return Vocabulary(_by_id(read_object(file), str(file)), frozenset(), file.name)


def _read_lines(file: Path) -> Vocabulary:
    lines = _decoded(_read(file), file).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return Vocabulary({number: line.rstrip("\r") for number, line in enumerate(lines)}, frozenset(), file.name)


def _read_binary(file: Path) -> Vocabulary:
    data = _read(file)
    if _TIKTOKEN_LINE.match(data):
        return Vocabulary(_tiktoken(data, file), frozenset(), file.name, spelling="base64")
    return Vocabulary(dict(enumerate(read_pieces(data, str(file)))), frozenset(), file.name, numbered=False)


def _tiktoken(data: bytes, file: Path) -> dict[int, str]:
    tokens: dict[int, str] = {}
    for line in data.splitlines():
        token, _, number = line.partition(b" ")
        if not number.isdigit() or len(number) > _MOST_DIGITS:
            raise CheckpointError(f"{file}: every line must be a token in base64 and its id, found {line[:40]!r}")
        tokens[int(number)] = token.decode("latin-1")
    return tokens


def _read(file: Path) -> bytes:
    try:
        return read_file(file, MAX_JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None


def _decoded(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8 text (byte {error.start})") from None


def _read_tokenizers(file: Path) -> Vocabulary | None:
    """Read a tokenizer.json; its largest part, the merges, is not parsed if it comes last, as it usually does.

    Returns:
        None if the file has no `model`.
    """
    vocabulary, added, model = None, None, False
    cursor = _Cursor(_decoded(_read(file), file))
    try:
        for key in cursor.members():
            if key == "model":
                model = True
                for part in cursor.members():
                    if part == "vocab":
                        vocabulary = cursor.value()
                        if added is not None:
                            return _assemble(vocabulary, added, file)
                    else:
                        cursor.value()
            elif key == "added_tokens":
                added = cursor.value()
            else:
                cursor.value()
    except RecursionError:
        raise CheckpointError(f"{file}: is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file}: is not valid JSON: {error.msg} at line {error.lineno}") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: is not acceptable JSON: {error}") from None
    if not model:
        return None
    if vocabulary is None:
        raise CheckpointError(f"{file}: has no model.vocab with its tokens")
    return _assemble(vocabulary, added, file)


def _assemble(vocabulary: Any, added: Any, file: Path) -> Vocabulary:
    if isinstance(vocabulary, list):
        # Unigram models: pairs of token and score, in the order of ids
        if not all(isinstance(pair, list) and pair and isinstance(pair[0], str) for pair in vocabulary):
            raise CheckpointError(f"{file}: model.vocab must hold pairs of a token and its score")
        tokens = {number: pair[0] for number, pair in enumerate(vocabulary)}
    else:
        tokens = _by_id(vocabulary, f"{file}: model.vocab")
    ids = set()
    for entry in added if isinstance(added, list) else ():
        number, content = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or number < 0 or not isinstance(content, str):
            raise CheckpointError(f"{file}: added_tokens must hold objects with an id and a content")
        tokens[number] = content
        ids.add(number)
    return Vocabulary(tokens, frozenset(ids), file.name)


def _number(text: str) -> int:
    # converting a million digits takes seconds
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


class _Cursor:
    """A position in a JSON text that advances value by value; text after the last needed value is not parsed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._decoder = json.JSONDecoder(parse_int=_number)

    def members(self) -> Iterator[str]:
        """Yield the keys of the object at this position; read the value of each key before the next one is asked for.

        Raises:
            ValueError: There is no object at this position.
        """
        self._take("{")
        if self._peek() == "}":
            self._at += 1
            return
        while True:
            if self._peek() != '"':
                raise json.JSONDecodeError("Expecting a key", self._text, self._at)
            key = self.value()
            self._take(":")
            yield key
            if self._peek() != ",":
                self._take("}")
                return
            self._at += 1

    def value(self) -> Any:
        """Parse and return the value at this position.

        Raises:
            ValueError: The text is not JSON.
        """
        self._peek()
        found, self._at = self._decoder.raw_decode(self._text, self._at)
        return found

    def _peek(self) -> str:
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at
        return self._text[self._at : self._at + 1]

    def _take(self, expected: str) -> None:
        if self._peek() != expected:
            raise json.JSONDecodeError(f"Expecting {expected!r}", self._text, self._at)
        self._at += 1
