"""Check the union of the models' tokenizers: it must be the donor's, so all need the same vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UnsupportedError
from ...recipe import ModelReference, Recipe
from ...tokenizer.vocabulary import read_vocabulary, same_vocabulary
from ..alignment.alignment import Member
from .vocabularies import tokenizer_files

__all__ = ["check_union"]


def check_union(recipe: Recipe, members: Mapping[ModelReference, Member]) -> None:
    """Check, if the recipe asks for the union of the tokenizers, that it is the donor's tokenizer.

    Raises:
        UnsupportedError: The vocabularies differ, or a model's is not known.
        CheckpointError: A file of a tokenizer is damaged.
    """
    if recipe.tokenizer_union is None:
        return
    problem = _difference(recipe, members)
    if problem is not None:
        raise UnsupportedError(
            f"{recipe.tokenizer_union}: {problem}, and the union of different ones comes in a later version; name the "
            "model whose tokenizer to keep, or 'base'"
        )


def _difference(recipe: Recipe, members: Mapping[ModelReference, Member]) -> str | None:
    """Return how a vocabulary differs from the donor's, or that one is unknown; None if all are the same."""
    files = tokenizer_files(members[recipe.donor].checkpoint)
    wanted = read_vocabulary(files)
    if wanted is None:
        return f"the vocabulary of {recipe.donor} is not known (no file of its tokenizer holds one)"
    for reference, member in members.items():
        others = tokenizer_files(member.checkpoint)
        if same_vocabulary(files, others):
            continue
        found = read_vocabulary(others)
        if found is None:
            return f"the vocabulary of {reference} is not known (no file of its tokenizer holds one)"
        if (found.tokens, found.spelling) != (wanted.tokens, wanted.spelling):
            return f"the vocabularies of {recipe.donor} and {reference} differ"
    return None
