"""A changed vocabulary, as data: which row each token of the output gets, and where every row comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["REPORT_NAME", "ModelChange", "VocabularyChange"]

REPORT_NAME = "merge.vocabulary.json"
"""The file of an output that lists every token whose rows were moved or made."""


@dataclass(frozen=True, slots=True)
class ModelChange:
    """What happens to the rows of one model.

    Args:
        model: Its name in the recipe.
        rows: Number of its rows.
        kept: How many of them keep their number.
        moved: How many get another number.
        made: Number of rows that are made for tokens that it lacks, by how they are made.
        lost: Number of its tokens that the output does not have.
        lost_tokens: Some of these, for messages.
    """

    model: str
    rows: int
    kept: int
    moved: int
    made: Mapping[str, int]
    lost: int
    lost_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class VocabularyChange:
    """The output's vocabulary, where rows are matched by token and some model changes.

    Attributes:
        owner: The model whose tokenizer the output gets.
        tokens: Number of tokens.
        rows: Number of rows of the output's embedding.
        added: Number of tokens that its tokenizer gets in addition.
        models: What happens to each model.
        report: Contents of the file that lists every change.
        texts: Contents of files that are written in place of the tokenizer's own, by name.
        stale: Names of files of the tokenizer that are left out, as they do not hold the new tokens.
        settings: How the rows of new tokens are made, if a method of `merganser transplant` makes them.
        digest: Hash of everything that decides where rows come from.
    """

    owner: str
    tokens: int
    rows: int
    added: int
    models: tuple[ModelChange, ...]
    report: bytes
    digest: str
    texts: Mapping[str, bytes] = field(default_factory=dict)
    stale: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return its counts, for the run record."""
        return {
            "tokenizer_of": self.owner,
            "tokens": self.tokens,
            "rows": self.rows,
            "added": self.added,
            "models": [
                {
                    "model": each.model,
                    "rows": each.rows,
                    "kept": each.kept,
                    "moved": each.moved,
                    "made": dict(each.made),
                    "lost": each.lost,
                }
                for each in self.models
            ],
            "made_by": None if self.settings is None else dict(self.settings),
            "list": REPORT_NAME,
        }
