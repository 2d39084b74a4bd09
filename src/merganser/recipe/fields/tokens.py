"""Read a recipe's rules for single tokens: `tokens` below `tokenizer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from ...errors import RecipeError, did_you_mean
from ..document.place import Entry, Node, Place
from ..document.scalar import shown
from .reference import ModelReference

KINDS = ("zero", "mean", "model_token")
"""What a row can be made from besides the same token of a model."""

_TOKEN_KEYS = ("source", "force")
_SOURCE_KEYS = ("kind", "model", "token", "token_id")

MAX_TOKENS = 10_000


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Where the rows of one token come from, in models that lack it.

    Args:
        token: The token.
        kind: "model": the row of the same token in `model`; "model_token": that of another token there; "zero": zeros;
            "mean": the mean of all rows of the model that lacks it.
        model: The model, for the first two.
        other: The other token, by its text or its id.
        force: Also replace the rows of models that have the token.
        place: Where the recipe says it.
    """

    token: str
    kind: Literal["model", "model_token", "zero", "mean"]
    model: ModelReference | None
    other: str | int | None
    force: bool
    place: Place


def read_token_rules(
    entry: Entry, models: Sequence[ModelReference], reference: Callable[[Entry], ModelReference]
) -> tuple[TokenRule, ...]:
    """Read the rules of a recipe's tokens.

    Args:
        entry: The mapping from tokens to rules.
        models: The models of the recipe.
        reference: Reads a reference to a model.

    Raises:
        RecipeError: A rule is not valid, or names a model that the recipe does not merge.
    """
    rules = []
    given = entry.mapping()
    if len(given) > MAX_TOKENS:
        raise entry.error(f"{len(given):,} tokens; {MAX_TOKENS:,} are allowed")
    for token, node in cast("dict[str, Node]", entry.value).items():
        if token not in given:
            raise RecipeError(
                f"{replace(entry.place, line=node.line)}: {shown(token)} has no rule, such as 'source: MODEL'"
            )
    for token, value in given.items():
        fields = value.mapping(_TOKEN_KEYS, required=["source"])
        force = fields["force"].flag() if "force" in fields else False
        rules.append(_rule(token, fields["source"], models, reference, force))
    return tuple(rules)


def _rule(
    token: str,
    source: Entry,
    models: Sequence[ModelReference],
    reference: Callable[[Entry], ModelReference],
    force: bool,
) -> TokenRule:
    if not isinstance(source.value, dict) or "kind" not in source.value:
        return TokenRule(token, "model", _known(source, models, reference), None, force, source.place)
    fields = source.mapping(_SOURCE_KEYS, required=["kind"])
    kind = fields["kind"].choice(KINDS)
    if kind != "model_token":
        if unused := next((key for key in _SOURCE_KEYS[1:] if key in fields), None):
            raise fields[unused].error(f"kind {kind!r} takes no {unused!r}; 'model_token' does")
        return TokenRule(token, "zero" if kind == "zero" else "mean", None, None, force, source.place)
    if "model" not in fields:
        raise source.error("'model' is missing: whose token is it?")
    if ("token" in fields) == ("token_id" in fields):
        raise source.error("kind 'model_token' takes exactly one of 'token' and 'token_id'")
    other = fields["token"].text() if "token" in fields else fields["token_id"].whole_number()
    model = _known(fields["model"], models, reference)
    return TokenRule(token, "model_token", model, other, force, source.place)


def _known(
    entry: Entry, models: Sequence[ModelReference], reference: Callable[[Entry], ModelReference]
) -> ModelReference:
    found = reference(entry)
    if found not in models:
        known = [str(model) for model in models]
        raise entry.error(
            f"{shown(str(found))} is not a model of this recipe.{did_you_mean(str(found), known)} It has {', '.join(known)}"
        )
    return found
