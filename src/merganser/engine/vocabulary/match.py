"""Decide whether the models' rows must be matched by token, and prepare the models if so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...checkpoint.folder import open_tokenizer
from ...errors import CheckpointError, MergeError, UnsupportedError
from ...recipe import ModelReference, Recipe
from ...tokenizer.vocabulary import Vocabulary, same_vocabulary
from ..alignment.alignment import Member
from ..plan.sections.vocabulary import VocabularyChange
from .apply import with_rows
from .mapping import map_rows
from .output import OutputVocabulary, output_vocabulary
from .report import describe
from .special_ids import moved_ids, renumbered
from .tokens import Tokens, read_tokens, tokenizer_files, tokens_without_rows

__all__ = ["Matched", "match_vocabularies", "open_owner", "with_ids"]


@dataclass(frozen=True, eq=False)
class Matched:
    """The models of a merge after their rows were matched by token.

    Args:
        members: All models; those whose rows changed read them in the output's order.
        owner: The model, or the tokenizer alone, whose tokenizer files the output gets.
        change: What changed; None if every row is where the output has it.
        vocabulary: The output's vocabulary; None if it is that of the owner.
        moved: New ids of the donor's tokens that have another id in the output, as of `moved_ids`.
        warnings: What the user should know.
    """

    members: dict[ModelReference, Member]
    owner: Member
    change: VocabularyChange | None = None
    vocabulary: Vocabulary | None = None
    moved: Mapping[int, int | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def match_vocabularies(
    recipe: Recipe, members: Mapping[ModelReference, Member], cache_dir: Path | None = None, *, stream: bool = False
) -> Matched:
    """Match the rows of the models' embeddings and heads by token, if the recipe chooses a tokenizer.

    Args:
        recipe: The recipe.
        members: All inputs.
        cache_dir: Folder for models from the Hub.
        stream: Whether weights of models from the Hub are left there.

    Raises:
        CheckpointError: A tokenizer is missing or damaged.
        UnsupportedError: The vocabularies cannot be united, or it is not known which token a row belongs to.
        RecipeError: A rule for a token does not fit the models.
    """
    owner = _owner(recipe, members, cache_dir, stream)
    plain = Matched(dict(members), owner)
    if not recipe.by_token:
        return plain
    chosen = _givers(recipe, members)
    if not recipe.token_rules and recipe.row_multiple == 1 and _alike(owner, chosen):
        if recipe.tokenizer_union is not None and read_tokens(owner) is None:
            raise UnsupportedError(f"{recipe.tokenizer_union}: {_unknown(owner.reference)}")
        return plain
    tokens, warnings = _tokens(recipe, owner, chosen)
    if tokens is None:
        return replace(plain, warnings=tuple(warnings))
    own, models = tokens
    out = output_vocabulary(recipe, own, models)
    warnings += _without_rows(recipe, own, out)
    rows = map_rows(recipe, models, out)
    if all(each.unchanged(model.rows) for each, model in zip(rows, models, strict=True)) and not out.texts:
        return replace(plain, warnings=tuple(warnings))
    made = with_rows(chosen, models, rows)
    change, said = describe(out, models, rows)
    donor = next((each for each in models if each.reference == recipe.donor), None)
    moved = {} if donor is None else moved_ids(donor.ids, out.ids)
    return Matched(
        {**members, **{member.reference: with_ids(member, moved, recipe) for member in made}},
        owner,
        change,
        Vocabulary({number: token for token, number in out.ids.items()}, frozenset(), "tokenizer.json"),
        moved,
        (*warnings, *out.warnings, *said),
    )


def open_owner(reference: ModelReference, where: str, cache_dir: Path | None, *, stream: bool = False) -> Member:
    """Open the donor of a tokenizer, which is not one of the models that are merged.

    Args:
        reference: The donor.
        where: What names it, for messages.
        cache_dir: Folder for models from the Hub.
        stream: Whether weights of models from the Hub are left there.

    Raises:
        CheckpointError: It cannot be opened, or has no tokenizer.
    """
    try:
        checkpoint = open_tokenizer(reference.path, revision=reference.revision, cache_dir=cache_dir, stream=stream)
    except MergeError as error:
        raise type(error)(f"{where}: {error}") from None
    if not tokenizer_files(checkpoint):
        raise CheckpointError(f"{where}: {reference}: has no files of a tokenizer")
    return Member.of(reference, checkpoint)


def _owner(recipe: Recipe, members: Mapping[ModelReference, Member], cache_dir: Path | None, stream: bool) -> Member:
    """Return the model whose tokenizer the output gets."""
    wanted = recipe.tokenizer_donor or recipe.donor
    if wanted in members:
        return members[wanted]
    place = recipe.places.get("tokenizer_source") or recipe.place_of("tokenizer")
    return open_owner(wanted, str(place), cache_dir, stream=stream)


def with_ids(member: Member, moved: Mapping[int, int | None], recipe: Recipe) -> Member:
    """Return a model with the new ids of special tokens in its config, if its config is the one that the output gets."""
    if member.reference != recipe.donor or not moved:
        return member
    checkpoint = replace(member.checkpoint, config=renumbered(member.checkpoint.config, moved))
    return replace(member, checkpoint=checkpoint)


def _givers(recipe: Recipe, members: Mapping[ModelReference, Member]) -> list[Member]:
    """Return the models of which embeddings or heads are merged: all, or those of the first and last slice."""
    if recipe.modules:
        return [member for member in members.values() if member.anatomy.embedding is not None]
    if not recipe.slices:
        return list(members.values())
    ends = [recipe.slices[0], recipe.slices[-1]]
    named = [source.model for piece in ends for source in piece.sources] + [piece.base_model for piece in ends]
    return [member for reference, member in members.items() if reference in (recipe.base_model, *named)]


def _alike(owner: Member, models: Sequence[Member]) -> bool:
    """Return whether all have as many rows and the same vocabulary files as the owner, which need not be parsed then."""
    files = tokenizer_files(owner.checkpoint)
    rows = {member.anatomy.vocab_size for member in (*models, *([owner] if owner.checkpoint.tensors else []))}
    return len(rows) == 1 and all(same_vocabulary(files, tokenizer_files(member.checkpoint)) for member in models)


def _tokens(
    recipe: Recipe, owner: Member, models: Sequence[Member]
) -> tuple[tuple[Tokens, list[Tokens]] | None, list[str]]:
    """Return the tokens of the owner and of each model, or None if no vocabulary is known; and warnings."""
    own = read_tokens(owner)
    found = [read_tokens(member) for member in models]
    changes = recipe.tokenizer_union or (
        (recipe.token_rules or recipe.row_multiple > 1) and recipe.place_of("tokenizer")
    )
    if own is None:
        if changes:
            raise UnsupportedError(f"{changes}: {_unknown(owner.reference)}")
        return None, []
    warnings, known = [], []
    for member, tokens in zip(models, found, strict=True):
        if tokens is None:
            if recipe.tokenizer_union is not None:
                raise UnsupportedError(f"{recipe.tokenizer_union}: {_unknown(member.reference)}")
            if member.anatomy.vocab_size != (own.rows or own.last + 1):
                raise CheckpointError(
                    f"{_unknown(member.reference)}, and it has {member.anatomy.vocab_size} rows, not as many as that of "
                    f"{owner.reference}; put the files of its tokenizer in its folder"
                )
            warnings.append(f"{_unknown(member.reference)}; taken for that of {owner.reference}")
            tokens = replace(own, reference=member.reference, rows=member.anatomy.vocab_size)
        known.append(tokens)
    return (own, known), warnings


def _without_rows(recipe: Recipe, owner: Tokens, out: OutputVocabulary) -> list[str]:
    """Refuse a requested tokenizer with tokens that have no row; only warn if it is the donor's."""
    problem = tokens_without_rows(owner.reference, owner.vocabulary, out.rows)
    if problem is None:
        return []
    if owner.reference == recipe.donor:
        return [problem]
    raise CheckpointError(f"{problem}. Name a model whose tokenizer fits under tokenizer_source")


def _unknown(reference: ModelReference) -> str:
    return f"the vocabulary of {reference} is not known (no file of its tokenizer holds one)"
