"""Give a model the tokens of its own vocabulary in Latin letters (TransMI).

Every piece of a SentencePiece Unigram vocabulary is romanised; a spelling that is not a piece yet becomes one, with a row
made from those of the pieces that have it. Text of another script can then be read after it was romanised, without
training. Source: Liu et al. 2024, arXiv:2405.09913, and the authors' code, in which `average` adds rows without dividing;
here it divides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..engine.alignment.alignment import Member
from ..engine.vocabulary.match import Matched
from ..errors import CheckpointError, UnsupportedError
from ..recipe import ModelReference, Recipe
from ..tokenizer.tokenizer_json import TokenizerJson
from ..tokenizer.union import Extension
from .grown import grown
from .match import tokens_of

__all__ = ["MODES", "match_romanised", "romaniser"]

MODES = ("max", "min", "average")
"""Which of the pieces of one spelling gives score and row of the new one: the likeliest, the least likely, or their mean."""

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_STEP = 256


def romaniser() -> Callable[[str], str]:
    """Return the function that writes a text in Latin letters; tests put another one in its place.

    Raises:
        UnsupportedError: The package uroman is not installed.
    """
    try:
        from uroman import Uroman
    except ImportError:
        raise UnsupportedError("--romanise needs uroman: pip install 'merganser[romanise]'") from None
    return Uroman().romanize_string  # type: ignore[no-any-return]


def match_romanised(
    recipe: Recipe,
    members: Mapping[ModelReference, Member],
    cache_dir: Path | None = None,
    *,
    mode: str,
    advance: Callable[[int, int], None] | None = None,
) -> Matched:
    """Return the recipe's only model with more rows, for its pieces in Latin letters.

    Args:
        recipe: It has one model.
        members: The model.
        cache_dir: Not used.
        mode: One of `MODES`.
        advance: Called with the number of pieces romanised, and of all.

    Raises:
        UnsupportedError: The model's vocabulary is not Unigram, or a package is missing.
        CheckpointError: Its tokenizer is damaged, or no piece changes.
    """
    [member] = members.values()
    model = tokens_of(member)
    document = model.document
    if document.kind != "Unigram":
        raise UnsupportedError(
            f"{model.reference}: its vocabulary is {document.kind}; only those of SentencePiece Unigram models, in which a new "
            "piece needs nothing but a score, can be romanised"
        )
    origins = _origins(document, model.rows, advance)
    if not origins:
        raise CheckpointError(
            f"{model.reference}: all pieces of its vocabulary are in Latin letters, or have no other form"
        )
    extension, terms = _extend(document, origins, mode, start=model.last + 1)
    settings = {"method": "transmi", "romanise": mode}
    return grown(member, model, extension, terms, kind="romanised", settings=settings)


def _origins(
    document: TokenizerJson, rows: int, advance: Callable[[int, int], None] | None
) -> dict[str, list[tuple[float, int]]]:
    """Return, for each new spelling, score and id of the pieces that have it, in the order of their ids."""
    romanise = romaniser()
    pieces = [
        (number, token)
        for token, number in document.trained.items()
        if token not in document.added and number < rows and not token.isascii() and not _BYTE.fullmatch(token)
    ]
    found: dict[str, list[tuple[float, int]]] = {}
    for done, (number, token) in enumerate(sorted(pieces), start=1):
        text = _SPACE.join(romanise(part) if part else "" for part in token.split(_SPACE))
        # a piece cannot hold blanks, and one of nothing but the mark of a blank says nothing
        if text != token and text.strip(_SPACE) and not re.search(r"\s", text) and text not in document.ids:
            found.setdefault(text, []).append((document.scores.get(token, 0.0), number))
        if advance is not None and (done % _STEP == 0 or done == len(pieces)):
            advance(done, len(pieces))
    return found


def _extend(
    document: TokenizerJson, origins: Mapping[str, list[tuple[float, int]]], mode: str, *, start: int
) -> tuple[Extension, dict[int, list[int]]]:
    """Return the new pieces, the likeliest first, and the rows that each one's row is the mean of."""
    chosen: list[tuple[float, str, list[int]]] = []
    for text, pieces in origins.items():
        if mode == "average":
            score, rows = sum(own for own, _ in pieces) / len(pieces), [number for _, number in pieces]
        else:
            # the lowest id among equal scores, as in the order of the vocabulary
            score, row = (max if mode == "max" else min)(
                pieces, key=lambda each: (each[0], -each[1] if mode == "max" else each[1])
            )
            rows = [row]
        chosen.append((score, text, rows))
    chosen.sort(key=lambda each: (-each[0], each[2]))
    extension = Extension()
    terms: dict[int, list[int]] = {}
    for score, text, rows in chosen:
        extension.add(text, None, None, start)
        extension.scores[text] = score
        terms[extension.tokens[text].id] = rows
    return extension, terms
