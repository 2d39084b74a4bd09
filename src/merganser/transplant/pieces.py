"""A new token as the mean of the model's own pieces of its text."""

from __future__ import annotations

from collections.abc import Mapping

from ..engine.vocabulary.tokens import Tokens
from ..errors import CheckpointError, UnsupportedError
from ..tokenizer.spelling import Spelling
from .shared import spelling

__all__ = ["cut_into_pieces"]


def cut_into_pieces(donor: Tokens, model: Tokens, wanted: Mapping[int, str]) -> dict[int, list[int]]:
    """Cut the text of tokens into tokens of the model.

    The model of its tokenizer (BPE, Unigram, WordPiece) cuts the text; normalisation and the splitting of words before
    it, which are for running text, are left out.

    Args:
        donor: The tokenizer whose tokens they are.
        model: The tokens of the model.
        wanted: Tokens by id.

    Returns:
        The model's rows for each token; nothing for texts that it cannot spell.

    Raises:
        UnsupportedError: The package `tokenizers` is not installed.
        CheckpointError: The model's tokenizer.json cannot be loaded.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UnsupportedError("--method subword needs tokenizers: pip install 'merganser[transformers]'") from None
    file = model.files["tokenizer.json"]
    try:
        cutter = Tokenizer.from_file(str(file)).model
    except Exception as error:  # the package raises plain exceptions
        raise CheckpointError(f"{file}: cannot be loaded: {error}") from None
    theirs, own = spelling(donor), spelling(model)
    found = {}
    for number, token in wanted.items():
        text = _respelled(token, theirs, own)
        if text:
            rows = [piece.id for piece in cutter.tokenize(text) if piece.id < model.rows]
            if rows:
                found[number] = rows
    return found


def _respelled(token: str, theirs: Spelling, own: Spelling) -> str | None:
    """Return a token's text in the spelling of the model."""
    data = theirs.read(token)
    return own.write(token.encode(errors="replace") if data is None else data)
