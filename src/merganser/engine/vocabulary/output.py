"""The output's vocabulary: which token gets which row, and the files of its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import RecipeError, UnsupportedError, did_you_mean
from ...jsonfile import read_object
from ...recipe import ModelReference, Recipe
from ...tokenizer.tokenizer_json import TokenizerJson
from ...tokenizer.union import Extension, plan_union, token_entry
from ...wording import some
from .tokens import Tokens, shown_token

__all__ = ["OutputVocabulary", "extended", "output_vocabulary"]

_STALE = ("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "tokenizer.model", "spiece.model")
_STALE_SUFFIXES = (".model", ".spm", ".bpe", ".vocab", ".tiktoken", ".merges")


@dataclass(frozen=True, eq=False)
class OutputVocabulary:
    """The tokens of the output.

    Attributes:
        owner: The model whose tokenizer the output gets, perhaps with more tokens.
        ids: Ids by token.
        rows: Number of rows of its embedding.
        added: Names of the models that the new tokens come from, by token; None for a token that the recipe makes.
        texts: Contents of files that replace the owner's, by name; empty if its files are copied as they are.
        stale: Names of the owner's files that do not hold the new tokens, and are left out.
        warnings: What the user should know.
    """

    owner: ModelReference
    ids: Mapping[str, int]
    rows: int
    added: Mapping[str, str | None] = field(default_factory=dict)
    texts: Mapping[str, bytes] = field(default_factory=dict)
    stale: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def output_vocabulary(recipe: Recipe, owner: Tokens, models: Sequence[Tokens]) -> OutputVocabulary:
    """Choose the output's tokens and rows.

    Args:
        recipe: It names the tokenizer, or asks for the union, and may name more tokens and a multiple for the rows.
        owner: The tokenizer that it names; for the union, that of the base or else of the first model.
        models: The tokenizers of the models whose rows are merged.

    Raises:
        UnsupportedError: The tokenizers cannot be united, or the file that would be changed does not exist.
        CheckpointError: A file of a tokenizer is damaged.
        RecipeError: A token that the recipe names cannot be added.
    """
    extension = Extension()
    if recipe.tokenizer_union is not None:
        extension = _union(recipe, owner, models)
    start = owner.last + 1
    known = owner.ids
    for rule in recipe.token_rules:
        if rule.token in known or rule.token in extension.tokens:
            continue
        if rule.kind == "model":
            near = did_you_mean(rule.token, [*known, *extension.tokens])
            holder = next((each for each in models if each.reference == rule.model), None)
            if holder is None or rule.token not in holder.ids:
                raise RecipeError(
                    f"{rule.place}: {rule.model} has no token {shown_token(rule.token)}.{near}".rstrip(".")
                )
        extension.add(rule.token, None, token_entry(rule.token), start)
    rows = owner.rows or owner.last + 1
    if extension.tokens:
        rows = max(rows, start + len(extension.tokens))
    if recipe.compat == "mergekit":
        rows = start + len(extension.tokens)
    rows = -(-rows // recipe.row_multiple) * recipe.row_multiple
    return extended(owner, extension, rows)


def extended(owner: Tokens, extension: Extension, rows: int) -> OutputVocabulary:
    """Return the vocabulary of a tokenizer with more tokens.

    Args:
        owner: The tokenizer.
        extension: What it gets in addition.
        rows: Rows of the output's embedding.

    Raises:
        UnsupportedError: The file that would be changed does not exist.
        CheckpointError: It is damaged, or has no place for the tokens.
    """
    known = owner.ids
    if not extension.tokens:
        return OutputVocabulary(owner.reference, known, rows)
    texts = _texts(owner, extension)
    stale = tuple(name for name in owner.files if name in _STALE or name.endswith(_STALE_SUFFIXES))
    said = f"{some(stale)}: without the new tokens, so left out; tokenizer.json has them all"
    return OutputVocabulary(
        owner=owner.reference,
        ids={**known, **{token: new.id for token, new in extension.tokens.items()}},
        rows=rows,
        added={token: new.owner for token, new in extension.tokens.items()},
        texts=texts,
        stale=stale,
        warnings=(said,) if stale else (),
    )


def _union(recipe: Recipe, owner: Tokens, models: Sequence[Tokens]) -> Extension:
    """Find the tokens that other models have in addition; files are parsed only where there are such tokens."""
    others = [each for each in models if each.reference != owner.reference and _has_more(each, owner)]
    if not others:
        return Extension()
    for each in others:
        if each.vocabulary.spelling != owner.vocabulary.spelling:
            raise UnsupportedError(f"{recipe.tokenizer_union}: {_files(owner, each)} spell tokens in different ways")
    try:
        first = (str(owner.reference), owner.document)
        return plan_union(first, [(str(each.reference), _with_rows(each)) for each in others])
    except UnsupportedError as error:
        raise UnsupportedError(f"{recipe.tokenizer_union}: {error}") from None


def _has_more(other: Tokens, owner: Tokens) -> bool:
    return any(token not in owner.ids for token, number in other.ids.items() if number < other.rows)


def _with_rows(tokens: Tokens) -> TokenizerJson:
    """Return the document without tokens that have no row in the model, which a union would have to invent."""
    document = tokens.document
    trained = {token: number for token, number in document.trained.items() if number < tokens.rows}
    added = {token: entry for token, entry in document.added.items() if entry["id"] < tokens.rows}
    return replace(document, trained=trained, added=added)


def _files(first: Tokens, second: Tokens) -> str:
    return f"{first.reference} ({first.vocabulary.file}) and {second.reference} ({second.vocabulary.file})"


def _texts(owner: Tokens, extension: Extension) -> dict[str, bytes]:
    """Return the changed files of the owner's tokenizer."""
    document = extension.document(owner.document)
    texts = {"tokenizer.json": json.dumps(document, indent=2, ensure_ascii=False).encode(errors="surrogatepass")}
    file = owner.files.get("tokenizer_config.json")
    if file is None:
        return texts
    config = read_object(file)
    if isinstance(config.get("added_tokens_decoder"), dict):
        fresh = {str(new.id): _decoder_entry(new.entry) for new in extension.tokens.values() if new.entry is not None}
        config["added_tokens_decoder"] = {**config["added_tokens_decoder"], **fresh}
        texts["tokenizer_config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return texts


def _decoder_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "id"}
