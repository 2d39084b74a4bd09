"""A tokenizer.json, checked: its trained vocabulary, its added tokens, and a copy with more tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..jsonfile import MAX_JSON_BYTES, os_reason, parse_object, read_file
from ..wording import brief, printable

__all__ = ["TokenizerJson", "read_tokenizer_json"]

KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")

_TEXT = (
    *("normalizer", "pre_tokenizer", "decoder"),
    *("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"),
)
"""Parts of the file, or of its `model`, that decide how a token is spelled; where they differ, equal texts are spelled
as different tokens, so that one vocabulary cannot hold the pieces of both."""

_UNLIKELY = 10.0
"""How far below the lowest score an added token stands in a Unigram vocabulary, where it must have a score."""

Merge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class TokenizerJson:
    """The contents of a tokenizer.json.

    Attributes:
        file: Its path, for messages.
        content: The whole document.
        kind: Type of its model: BPE, WordPiece, WordLevel or Unigram.
        trained: Ids of the trained vocabulary, by token.
        scores: Scores of a Unigram vocabulary, by token; empty for other kinds.
        added: Entries of the added tokens, by token.
    """

    file: str
    content: Mapping[str, Any]
    kind: str
    trained: Mapping[str, int]
    scores: Mapping[str, float]
    added: Mapping[str, Mapping[str, Any]]

    @property
    def ids(self) -> dict[str, int]:
        """Ids of all tokens, by token."""
        return {**self.trained, **{token: entry["id"] for token, entry in self.added.items()}}

    @property
    def merges(self) -> list[Merge]:
        """The merges of a BPE model, in their order."""
        return [_merge(each, self.file) for each in self.content["model"].get("merges") or ()]

    def differences(self, other: TokenizerJson) -> list[str]:
        """Return the parts in which another tokenizer spells tokens differently; empty if pieces can be shared."""
        if self.kind != other.kind:
            return [f"model.type is {other.kind}, not {self.kind}"]
        found = []
        for key in _TEXT:
            own, theirs = (each.content.get(key, each.content["model"].get(key)) or None for each in (self, other))
            if own != theirs:
                found.append(f"{key} is {brief(theirs, 50)}, not {brief(own, 50)}")
        return found

    def extended(
        self,
        pieces: Mapping[str, int],
        added: Mapping[str, Mapping[str, Any]],
        *,
        merges: Iterable[Merge] = (),
        scores: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Return the document with more tokens.

        Programs that read the file number added tokens again, after the trained vocabulary, unless these stand in the
        trained vocabulary, too. So all added tokens are written there.

        Args:
            pieces: Ids of more trained tokens.
            added: Entries of more added tokens, with their ids.
            merges: More merges of a BPE model; they come after its own.
            scores: Scores of the pieces of a Unigram model.

        Raises:
            CheckpointError: A Unigram vocabulary would have ids without tokens, which its list cannot express.
        """
        content: dict[str, Any] = copy.deepcopy(dict(self.content))
        every = {**self.added, **added}
        content["added_tokens"] = sorted((dict(entry) for entry in every.values()), key=lambda entry: entry["id"])
        numbered = {**self.trained, **pieces, **{token: entry["id"] for token, entry in every.items()}}
        if self.kind == "Unigram":
            content["model"]["vocab"] = self._listed(numbered, {**self.scores, **(scores or {})})
            return content
        content["model"]["vocab"] = dict(sorted(numbered.items(), key=lambda item: item[1]))
        if self.kind == "BPE":
            own = content["model"].get("merges") or []
            pairs = not own or isinstance(own[0], list)
            more = [list(pair) if pairs else " ".join(pair) for pair in merges]
            content["model"]["merges"] = [*own, *more]
        return content

    def _listed(self, numbered: Mapping[str, int], scores: Mapping[str, float]) -> list[list[Any]]:
        ordered = sorted(numbered, key=lambda token: numbered[token])
        gap = next((number for number, token in enumerate(ordered) if numbered[token] != number), None)
        if gap is not None:
            raise CheckpointError(
                f"{self.file}: id {gap} has no token, and a Unigram vocabulary has no place for tokens after such a gap; "
                "keep the tokenizer of one model instead (tokenizer_source)"
            )
        lowest = min(self.scores.values(), default=0.0) - _UNLIKELY
        return [[token, scores.get(token, lowest)] for token in ordered]


def read_tokenizer_json(file: Path) -> TokenizerJson:
    """Read and check a tokenizer.json.

    Raises:
        CheckpointError: It is damaged, has no vocabulary, gives two tokens one id or one token two ids.
    """
    try:
        data = read_file(file, MAX_JSON_BYTES)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None
    # a token that is written twice must not vanish
    content = parse_object(data, str(file))
    model = content.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise CheckpointError(f"{file}: has no model.vocab with its tokens")
    vocabulary = model["vocab"]
    kind = model.get("type") or ("Unigram" if isinstance(vocabulary, list) else "BPE")
    if kind not in KINDS or isinstance(vocabulary, list) is not (kind == "Unigram"):
        raise CheckpointError(f"{file}: model.type {brief(kind)} is not known; known are {', '.join(KINDS)}")
    scores: dict[str, float] = {}
    trained = _pieces(vocabulary, file, scores) if isinstance(vocabulary, list) else _table(vocabulary, file)
    added = _added(content.get("added_tokens"), trained, file)
    _refuse_shared_ids([*trained.items(), *((t, e["id"]) for t, e in added.items() if t not in trained)], file)
    return TokenizerJson(str(file), content, kind, trained, scores, added)


def _table(vocabulary: Any, file: Path) -> dict[str, int]:
    if not isinstance(vocabulary, dict) or not all(
        type(number) is int and number >= 0 for number in vocabulary.values()
    ):
        raise CheckpointError(f"{file}: model.vocab: must map tokens to ids, which are whole numbers of at least 0")
    return vocabulary


def _pieces(vocabulary: Sequence[Any], file: Path, scores: dict[str, float]) -> dict[str, int]:
    trained: dict[str, int] = {}
    for number, pair in enumerate(vocabulary):
        fits = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        if not fits or isinstance(pair[1], bool) or not isinstance(pair[1], int | float):
            raise CheckpointError(f"{file}: model.vocab must hold pairs of a token and its score")
        token, score = pair
        if token in trained:
            raise CheckpointError(
                f"{file}: model.vocab: token {_shown(token)} has two ids, {trained[token]} and {number}"
            )
        trained[token], scores[token] = number, float(score)
    return trained


def _added(entries: Any, trained: Mapping[str, int], file: Path) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    if entries is not None and not isinstance(entries, list):
        raise CheckpointError(f"{file}: added_tokens must be a list")
    for entry in entries or ():
        number, token = (entry.get("id"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or number < 0 or not isinstance(token, str):
            raise CheckpointError(f"{file}: added_tokens must hold objects with an id and a content")
        other = found[token]["id"] if token in found else trained.get(token, number)
        if other != number or token in found:
            raise CheckpointError(f"{file}: token {_shown(token)} has two ids, {other} and {number}")
        found[token] = entry
    return found


def _refuse_shared_ids(items: Iterable[tuple[str, int]], file: Path) -> None:
    owners: dict[int, str] = {}
    for token, number in items:
        if number in owners:
            raise CheckpointError(f"{file}: id {number} has two tokens, {_shown(owners[number])} and {_shown(token)}")
        owners[number] = token


def _merge(entry: Any, file: str) -> Merge:
    parts = entry.split(" ") if isinstance(entry, str) else entry
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"{file}: model.merges must hold pairs of tokens, found {brief(entry, 40)}")
    return parts[0], parts[1]


def _shown(token: str) -> str:
    return printable(brief(token, 40))
