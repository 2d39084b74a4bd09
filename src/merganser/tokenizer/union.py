"""Build one tokenizer of several: the first one's tokens keep their ids, and the tokens that it lacks follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UnsupportedError
from ..wording import plural
from .tokenizer_json import Merge, TokenizerJson

__all__ = ["Extension", "NewToken", "plan_union", "token_entry"]


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that a tokenizer gets in addition.

    Args:
        id: Its id, and so the row of the embedding.
        owner: Name of the model that has it; None if none has.
        entry: Its entry among the added tokens, with its id; None for a piece of the trained vocabulary.
    """

    id: int
    owner: str | None
    entry: Mapping[str, Any] | None


@dataclass(slots=True)
class Extension:
    """What a tokenizer gets in addition.

    Args:
        tokens: The new tokens.
        merges: Merges of BPE for the new pieces, which come after the tokenizer's own.
        scores: Scores of the new pieces of a Unigram vocabulary.
    """

    tokens: dict[str, NewToken] = field(default_factory=dict)
    merges: list[Merge] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)

    def add(self, token: str, owner: str | None, entry: Mapping[str, Any] | None, start: int) -> None:
        """Append a token at the next free id; `start` is the first one."""
        number = start + len(self.tokens)
        self.tokens[token] = NewToken(number, owner, None if entry is None else {**entry, "id": number})

    def document(self, first: TokenizerJson) -> dict[str, Any]:
        """Return the contents of the tokenizer.json with all tokens.

        Raises:
            CheckpointError: The file's format has no place for them.
        """
        pieces = {token: new.id for token, new in self.tokens.items() if new.entry is None}
        added = {token: new.entry for token, new in self.tokens.items() if new.entry is not None}
        return first.extended(pieces, added, merges=self.merges, scores=self.scores)


def token_entry(token: str) -> dict[str, Any]:
    """Return the entry of an added token, as transformers writes it for a token that is added as a text."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": token, **flags}


def plan_union(first: tuple[str, TokenizerJson], others: Sequence[tuple[str, TokenizerJson]]) -> Extension:
    """Find the tokens of other tokenizers that the first one lacks, and give them ids.

    Trained pieces stay trained pieces, with their merges or scores, so that ordinary text is split by them as in the
    model that they come from where the first tokenizer's own merges allow it.

    Args:
        first: Name and tokenizer of the model whose ids stay as they are.
        others: Names and tokenizers of the other models; earlier ones give their tokens first.

    Raises:
        UnsupportedError: Pieces of another tokenizer are spelled in another way, so that one vocabulary cannot hold both.
    """
    name, tokenizer = first
    own = tokenizer.ids
    start = max(own.values(), default=-1) + 1
    found = Extension()
    known_merges = set(tokenizer.merges) if tokenizer.kind == "BPE" else set()
    for other, theirs in others:
        ids = theirs.ids
        new = [
            token
            for token in sorted(ids, key=lambda token: ids[token])
            if token not in own and token not in found.tokens
        ]
        pieces = [token for token in new if token not in theirs.added]
        if pieces and (wrong := tokenizer.differences(theirs)):
            raise UnsupportedError(
                f"the tokenizers of {name} and {other} spell their tokens in different ways ({'; '.join(wrong)}), so no "
                f"tokenizer can hold the {plural(len(pieces), 'piece')} that only {other} has; name the model whose "
                "tokenizer to keep, or give one model the other's tokenizer first (merganser transplant)"
            )
        for token in new:
            found.add(token, other, theirs.added.get(token), start)
        found.scores |= {token: theirs.scores[token] for token in pieces if token in theirs.scores}
        if pieces and tokenizer.kind == "BPE":
            _take_merges(theirs, pieces, found, known_merges)
    return found


def _take_merges(theirs: TokenizerJson, pieces: Sequence[str], found: Extension, known: set[Merge]) -> None:
    """Take the merges that make new pieces."""
    prefix = theirs.content["model"].get("continuing_subword_prefix") or ""
    wanted = set(pieces)
    for left, right in theirs.merges:
        if (left, right) not in known and left + right.removeprefix(prefix) in wanted:
            known.add((left, right))
            found.merges.append((left, right))
