"""Which token each row of a model's embedding belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...checkpoint import Checkpoint
from ...checkpoint.files.sidefiles import is_tokenizer_file
from ...errors import CheckpointError, UnsupportedError
from ...recipe import ModelReference
from ...tokenizer.comparison import is_placeholder
from ...tokenizer.tokenizer_json import TokenizerJson, read_tokenizer_json
from ...tokenizer.vocabulary import Vocabulary, read_vocabulary
from ...wording import plural, some
from ..alignment.alignment import Member

__all__ = ["Tokens", "read_tokens", "shown_token", "shown_tokens", "tokenizer_files", "tokens_without_rows"]

_LONGEST = 40


@dataclass(frozen=True, eq=False)
class Tokens:
    """A model's tokens.

    Attributes:
        reference: The model.
        files: The files of its tokenizer, by name.
        vocabulary: Its vocabulary.
        rows: Number of rows of its embedding; 0 for a tokenizer without a model.
    """

    reference: ModelReference
    files: Mapping[str, Path]
    vocabulary: Vocabulary
    rows: int

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids by token.

        Raises:
            CheckpointError: A token has two ids.
        """
        found: dict[str, int] = {}
        for number, token in sorted(self.vocabulary.tokens.items()):
            if token in found:
                raise CheckpointError(
                    f"{self.reference}: {self.vocabulary.file}: token {shown_token(token)} has two ids, "
                    f"{found[token]} and {number}; remove one of them"
                )
            found[token] = number
        return found

    @cached_property
    def document(self) -> TokenizerJson:
        """Its tokenizer.json.

        Raises:
            UnsupportedError: It has none.
            CheckpointError: It is damaged.
        """
        file = self.files.get("tokenizer.json")
        if file is None:
            raise UnsupportedError(
                f"{self.reference}: has no tokenizer.json (its tokens are in {self.vocabulary.file}), which is needed to "
                "change its vocabulary; load and save the tokenizer with transformers, which writes one"
            )
        return read_tokenizer_json(file)

    @property
    def last(self) -> int:
        """The highest id; -1 if there is none."""
        return max(self.vocabulary.tokens, default=-1)


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the files of a checkpoint's tokenizer, by name.

    Raises:
        CheckpointError: One is a link that leaves the checkpoint's folder.
    """
    beside = (path for path in checkpoint.side_files if path.parent == checkpoint.path)
    return {path.name: path for path in beside if is_tokenizer_file(path.name)}


def read_tokens(member: Member) -> Tokens | None:
    """Read the tokens of a model; None if no file holds them.

    Raises:
        CheckpointError: A file of its tokenizer is damaged.
    """
    files = tokenizer_files(member.checkpoint)
    vocabulary = read_vocabulary(files)
    if vocabulary is None:
        return None
    return Tokens(member.reference, files, vocabulary, member.anatomy.vocab_size or 0)


def shown_token(token: str) -> str:
    """Return a token's `repr`, so that control characters and lone surrogates are escaped; shortened if long."""
    text = repr(token)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def shown_tokens(tokens: Mapping[int, str]) -> str:
    """Return tokens with their ids as messages quote them; of many, the first."""
    return some([f"{shown_token(token)} ({number})" for number, token in tokens.items()])


def tokens_without_rows(owner: ModelReference, vocabulary: Vocabulary, rows: int) -> str | None:
    """Return a message if a tokenizer has tokens, other than reserved ones, after the last row; else None."""
    behind = {n: token for n, token in sorted(vocabulary.tokens.items()) if n >= rows and not is_placeholder(token)}
    if not behind or not vocabulary.numbered:
        return None
    return (
        f"{owner}: its tokenizer has {plural(len(behind), 'token')} after the last of the {rows:,} rows of the "
        f"output's embedding: {shown_tokens(behind)}; a text with one of them cannot be read"
    )
