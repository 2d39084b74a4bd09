"""Give a model tokens that stand for frequent pairs of its own tokens in a text, so that such text becomes shorter.

The pairs are those of byte-pair encoding that starts from the model's own tokens and stays within the words of its
tokenizer; the row of a new token is made from those of its parts, without training. Source: Feher, Vulic and Minixhofer
2024, arXiv:2411.18553, and the authors' code (`fvt_dynamic_bpe`, the mean of the parts). They merge anew for every batch,
which `merganser.runtime.merge_words` does; here the pairs of one text become part of the tokenizer. Their hypernetwork makes
rows of any tokens; that of `training` is trained for these.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from ..engine.alignment.alignment import Member
from ..engine.vocabulary.match import Matched
from ..engine.vocabulary.tokens import Tokens
from ..errors import CheckpointError, DataError, UnsupportedError, did_you_mean
from ..jsonfile import os_reason, read_file
from ..recipe import ModelReference, Recipe
from ..tokenizer.pairs import Pairs
from ..tokenizer.union import Extension
from .grown import grown
from .match import tokens_of

__all__ = ["PARTS", "match_merged", "read_texts"]

PARTS = ("mean", "last", "first")
"""Which parts make the row of a new token: the mean of all, the last, or the first."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LARGEST = 1 << 28
_PIECE = 4000
"""Characters of a piece of text, about; every tenth piece is held out."""
_HELD = 10
_STEP = 64
_LEAST = 2
"""Occurrences that a pair needs."""


def read_texts(files: Sequence[str | Path]) -> list[str]:
    """Read files of text.

    Raises:
        DataError: A file is missing, empty, too large or not UTF-8.
    """
    texts = []
    for file in files:
        try:
            text = read_file(Path(file).expanduser(), _LARGEST).decode("utf-8-sig")
        except FileNotFoundError:
            near = Path(file).parent
            known = [path.name for path in near.iterdir()] if near.is_dir() else []
            raise DataError(f"--text {file}: there is no such file.{did_you_mean(Path(file).name, known)}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"--text {file}: is not UTF-8 text (byte {error.start})") from None
        except (OSError, RuntimeError) as error:
            reason = os_reason(error) if isinstance(error, OSError) else "there is no such home folder"
            raise DataError(f"--text {file}: cannot be read: {reason}") from None
        if not text.strip():
            raise DataError(f"--text {file}: is empty")
        texts.append(text)
    return texts


def match_merged(
    recipe: Recipe,
    members: Mapping[ModelReference, Member],
    cache_dir: Path | None = None,
    *,
    texts: Sequence[str],
    count: int,
    parts: str,
    steps: int = 0,
    advance: Callable[[int, int], None] | None = None,
) -> Matched:
    """Return the recipe's only model with more rows, for tokens that are frequent pairs of its own.

    Args:
        recipe: It has one model.
        members: The model.
        cache_dir: Folder for models from the Hub.
        texts: The text in which pairs are counted. Of its pieces, every tenth is held out, to measure on.
        count: Number of new tokens; fewer, where no pair is left that occurs twice.
        parts: One of `PARTS`.
        steps: Steps in which a network that makes the rows is trained on the text; 0 for none.
        advance: Called with the number of new tokens, and of all; then with the steps of training.

    Raises:
        UnsupportedError: The model's vocabulary is not a byte-pair encoding, a package is missing, or rows cannot be trained.
        CheckpointError: Its tokenizer is damaged.
        DataError: No pair of tokens occurs twice in a word.
    """
    [member] = members.values()
    model = tokens_of(member)
    if model.document.kind != "BPE":
        raise UnsupportedError(
            f"{model.reference}: its vocabulary is {model.document.kind}; only byte-pair encoding, in which a new token is a "
            "merge of two others, takes merged tokens"
        )
    cutter = _tokenizer(model.document.content, model.document.file)
    pieces = [piece for text in texts for piece in _pieces(text)]
    held = pieces[_HELD - 1 :: _HELD]
    counted = [piece for place, piece in enumerate(pieces) if (place + 1) % _HELD]
    found = _merge(Pairs(_words(cutter, counted)), _Rules(model), count, advance)
    if not found.extension.tokens:
        raise DataError("--text: no pair of tokens occurs twice in a word of it; more text, or other text, is needed")
    longer = _tokenizer(found.extension.document(model.document), model.document.file)
    settings = {
        "method": "merged pairs",
        "new_tokens": len(found.extension.tokens),
        "parts": parts,
        "held_out_bytes": sum(len(piece.encode()) for piece in held),
        "held_out_tokens_before": _length(cutter, held),
        "held_out_tokens_after": _length(longer, held),
    }
    trained = None
    if steps:
        from .training import learn

        made = [found.parts[token.id] for token in found.extension.tokens.values()]
        trained, more = learn(
            member, made, model.last + 1, _ids(longer, counted), _ids(longer, held), steps, cache_dir, advance
        )
        settings |= more
    chosen = {"mean": slice(None), "last": slice(-1, None), "first": slice(1)}[parts]
    rows = {token: own[chosen] for token, own in found.parts.items()}
    kind = "network" if trained else "parts"
    return grown(member, model, found.extension, rows, kind=kind, settings=settings, trained=trained)


@dataclass(slots=True)
class _Found:
    """New tokens with their merges, and which of the model's own tokens each is made of."""

    extension: Extension = field(default_factory=Extension)
    parts: dict[int, tuple[int, ...]] = field(default_factory=dict)


class _Rules:
    """Which pairs of tokens may become one.

    Args:
        model: The tokens of the model.
    """

    def __init__(self, model: Tokens) -> None:
        document = model.document
        own: Mapping[str, Any] = document.content["model"]
        self.start = model.last + 1
        self._prefix = own.get("continuing_subword_prefix") or ""
        self._known = document.ids
        # a list of merges as texts has a blank between both
        merges = own.get("merges") or []
        self._blanks = not merges or isinstance(merges[0], list)
        apart = {*document.added, own.get("unk_token")}
        self.texts = {
            number: token
            for token, number in document.trained.items()
            if number < model.rows and token not in apart and not (own.get("byte_fallback") and _BYTE.fullmatch(token))
        }

    def join(self, pair: tuple[int, int]) -> str | None:
        """Return the text of the token that a pair becomes; None if it may not become one."""
        left, right = (self.texts.get(each) for each in pair)
        if left is None or right is None:
            return None
        text = left + right.removeprefix(self._prefix)
        if text in self._known or (" " in left + right and not self._blanks):
            return None
        return text


def _merge(pairs: Pairs, rules: _Rules, count: int, advance: Callable[[int, int], None] | None) -> _Found:
    """Merge pairs until there are so many new tokens."""
    found = _Found()
    numbers: dict[tuple[int, int], int] = {}
    while (best := pairs.best()) is not None and best[1] >= _LEAST:
        pair = best[0]
        text = rules.join(pair)
        if text is None:
            pairs.drop(pair)
            continue
        if pair not in numbers:
            new = found.extension.tokens.get(text)
            if new is None:
                if len(found.extension.tokens) == count:
                    break
                found.extension.add(text, None, None, rules.start)
                new = found.extension.tokens[text]
                rules.texts[new.id] = text
                found.parts[new.id] = tuple(part for each in pair for part in found.parts.get(each, (each,)))
                if advance is not None and (len(found.parts) % _STEP == 0 or len(found.parts) == count):
                    advance(len(found.parts), count)
            numbers[pair] = new.id
            found.extension.merges.append((rules.texts[pair[0]], rules.texts[pair[1]]))
        pairs.merge(pair, numbers[pair])
    return found


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of about `_PIECE` characters, of a short text into about 40, at ends of lines or before blanks."""
    length = min(_PIECE, max(1, len(text) // (4 * _HELD)))
    at = 0
    while at < len(text):
        line, blank = (text.find(mark, at + length, at + 2 * length) for mark in "\n ")
        end = line + 1 if line >= 0 else blank if blank >= 0 else at + 2 * length
        yield text[at:end]
        at = end


def _words(cutter: Any, pieces: Sequence[str]) -> Counter[tuple[int, ...]]:
    """Return how often each word occurs, by its tokens; words are what the tokenizer cuts before it merges."""
    words: Counter[tuple[int, ...]] = Counter()
    for piece in pieces:
        encoding = cutter.encode(piece, add_special_tokens=False)
        for _, group in groupby(zip(encoding.word_ids, encoding.ids, strict=True), key=lambda each: each[0]):
            word = tuple(number for _, number in group)
            if len(word) > 1:
                words[word] += 1
    return words


def _ids(cutter: Any, pieces: Sequence[str]) -> list[list[int]]:
    return [cutter.encode(piece, add_special_tokens=False).ids for piece in pieces]


def _length(cutter: Any, pieces: Sequence[str]) -> int:
    return sum(map(len, _ids(cutter, pieces)))


def _tokenizer(document: Mapping[str, Any], file: str) -> Any:
    """Return the tokenizer that a tokenizer.json describes.

    Raises:
        UnsupportedError: The package `tokenizers` is not installed.
        CheckpointError: It cannot be loaded.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UnsupportedError("--text needs tokenizers: pip install 'merganser[transformers]'") from None
    try:
        found = Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # the package raises plain exceptions
        raise CheckpointError(f"{file}: cannot be loaded: {error}") from None
    found.no_truncation()
    found.no_padding()
    return found
