"""Check that each row of the embeddings and heads belongs to the same token in every merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import CheckpointError
from ...recipe import ModelReference, Recipe
from ...tokenizer.comparison import Comparison, Renamed, compare_vocabularies
from ...tokenizer.vocabulary import Vocabulary, read_vocabulary, same_vocabulary
from ...wording import plural, some
from ..alignment.alignment import Alignment, Member
from ..vocabulary.tokens import shown_token, shown_tokens, tokenizer_files, tokens_without_rows

__all__ = ["compare_tokens"]

_BY_TOKEN = "'tokenizer_source: base' or 'tokenizer_source: union' in the recipe matches rows by token"


def compare_tokens(
    recipe: Recipe, members: Mapping[ModelReference, Member], giver: Member, alignment: Alignment
) -> list[str]:
    """Compare the tokens of the models whose embedding rows are merged, and of the one whose tokenizer is used.

    Files with identical bytes are not parsed. A model without a tokenizer is not compared.

    Args:
        recipe: The recipe.
        members: All inputs by reference.
        giver: The model whose tokenizer the output gets.
        alignment: Which models each output tensor is merged from.

    Returns:
        Warnings for the user.

    Raises:
        CheckpointError: A row belongs to different tokens in two models, or the tokenizer that the recipe asks for is
            missing or has more tokens than rows.
    """
    owner = giver.reference
    _check_source(giver, members[recipe.donor])
    rows, givers = _rows(alignment, members[recipe.donor])
    if rows is None:
        return []
    distinct, warnings = _distinct({owner: giver, **{reference: members[reference] for reference in givers}})
    vocabularies: dict[ModelReference, Vocabulary] = {}
    if len(distinct) > 1 or recipe.tokenizer_donor is not None:
        for reference, files in distinct.items():
            try:
                found = read_vocabulary(files)
            except CheckpointError as error:
                warnings.append(_not_compared(reference, error))
                continue
            if found is not None:
                vocabularies[reference] = found
    if vocabularies:
        (first, ours), *others = vocabularies.items()
        for reference, theirs in others:
            warnings += _check(first, reference, compare_vocabularies(ours, theirs, rows), ours, theirs)
    if owner in vocabularies:
        warnings += _too_many(recipe, owner, vocabularies[owner], rows)
    return warnings


def _distinct(members: Mapping[ModelReference, Member]) -> tuple[dict[ModelReference, dict[str, Path]], list[str]]:
    """Return each distinct tokenizer's files, under the first model that has it, and warnings about unreadable ones."""
    found: dict[ModelReference, dict[str, Path]] = {}
    warnings = []
    for reference, member in members.items():
        try:
            files = tokenizer_files(member.checkpoint)
            if files and not any(same_vocabulary(other, files) for other in found.values()):
                found[reference] = files
        except CheckpointError as error:
            warnings.append(_not_compared(reference, error))
    return found, warnings


def _not_compared(reference: ModelReference, error: CheckpointError) -> str:
    return f"{error}; so the tokens of {reference} were not compared with those of the other models"


def _check_source(owner: Member, donor: Member) -> None:
    """Refuse to replace the donor's tokenizer by that of a model without one."""
    if owner is not donor and not tokenizer_files(owner.checkpoint) and tokenizer_files(donor.checkpoint):
        raise CheckpointError(
            f"{owner.reference}: has no files of a tokenizer, and tokenizer_source asks for its own; name a model that has "
            "one"
        )


def _rows(alignment: Alignment, donor: Member) -> tuple[int | None, list[ModelReference]]:
    """Return the number of rows of the output's embedding, and the models merged into embedding and head."""
    rows = None
    givers: list[ModelReference] = []
    for slot in alignment.slots:
        if slot.name not in (donor.anatomy.embedding, donor.anatomy.head):
            continue
        givers += slot.inputs
        if slot.name == donor.anatomy.embedding:
            rows = next(iter(slot.inputs.values())).shape[0]
    return rows, givers


def _check(
    first: ModelReference, second: ModelReference, found: Comparison, ours: Vocabulary, theirs: Vocabulary
) -> list[str]:
    """Refuse rows that belong to different tokens; return warnings about other differences."""
    if not found.comparable:
        return [
            f"{second}: its tokens ({theirs.file}) were not compared with those of {first} ({ours.file}): the files "
            "number them each in its own way"
        ]
    if not found.mergeable:
        wrong = found.permuted or found.replaced
        raise CheckpointError(
            f"{second}: {_stand_for(wrong)} in {first}: {_renamed(wrong)}. Rows are merged by their number, so both models must "
            f"have the same tokenizer; {_BY_TOKEN}"
        )
    warnings = []
    if other := [*found.replaced, *found.renamed]:
        warnings.append(
            f"{second}: {_stand_for(other)} in {first}: {_renamed(other)}; merged all the same; {_BY_TOKEN}"
        )
    for one, two, tokens in ((first, second, found.only_first), (second, first, found.only_second)):
        if tokens:
            warnings.append(
                f"{one}: {plural(len(tokens), 'token')} that the tokenizer of {two} does not have, whose rows stand "
                f"for nothing there: {shown_tokens(tokens)}; they are merged all the same"
            )
    return warnings


def _too_many(recipe: Recipe, owner: ModelReference, vocabulary: Vocabulary, rows: int) -> list[str]:
    """Refuse a requested tokenizer with tokens that have no row; only warn if it is the donor's."""
    problem = tokens_without_rows(owner, vocabulary, rows)
    if problem is None:
        return []
    if recipe.tokenizer_donor is None or owner == recipe.donor:
        return [problem]
    raise CheckpointError(f"{problem}. Name a model whose tokenizer fits under tokenizer_source")


def _stand_for(rows: Sequence[Renamed]) -> str:
    if len(rows) == 1:
        return "1 row of the embedding belongs to another token than"
    return f"{len(rows):,} rows of the embedding belong to other tokens than"


def _renamed(rows: Sequence[Renamed]) -> str:
    return some([f"{row.id} is {shown_token(row.second)}, not {shown_token(row.first)}" for row in rows])
