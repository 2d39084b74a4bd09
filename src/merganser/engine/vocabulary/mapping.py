"""For each model, which of its rows, or of which other model's, each row of the output's vocabulary gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...checkpoint.derived.gathered import MadeRows, RowMap
from ...errors import RecipeError, did_you_mean
from ...recipe import ModelReference, Recipe
from ...recipe.fields.tokens import TokenRule
from .output import OutputVocabulary
from .tokens import Tokens, shown_token

__all__ = ["Made", "ModelRows", "map_rows"]

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Made:
    """How the rows of a token that a model lacks are made.

    Args:
        kind: "copy" of one row, "mean" of the rows of the token in the models that have it, "mean of all rows" of the
            model itself, or "zero".
        terms: The rows: index of the model among those of the merge, and its row. None for "mean of all rows".
    """

    kind: str
    terms: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True, eq=False)
class ModelRows:
    """Where the rows of one model come from.

    Attributes:
        reference: The model.
        own: For each row of the output, the model's own row; -1 where it has none.
        made: How the other rows are made, by row of the output.
        lost: The model's tokens that the output does not have, by row.
    """

    reference: ModelReference
    own: Rows
    made: Mapping[int, Made]
    lost: Mapping[int, str]

    @property
    def moved(self) -> int:
        """Number of rows that have another number in the output."""
        return int(((self.own >= 0) & (self.own != np.arange(len(self.own)))).sum())

    def unchanged(self, rows: int) -> bool:
        """Return whether a model of so many rows stays as it is."""
        return len(self.own) == rows and bool((self.own == np.arange(rows)).all())

    def row_map(self, tokens: Tokens, order: Sequence[int]) -> RowMap:
        """Return the map for its tensors.

        Args:
            tokens: The model's tokens.
            order: Index of each model among the tensors that rows are gathered from; the model itself has index 0.
        """
        index = self.own.copy()
        numbers: dict[Made, int] = {}
        for row, made in self.made.items():
            index[row] = -1 - numbers.setdefault(made, len(numbers))
        terms = []
        for made in numbers:
            if made.terms is None:
                named = sorted(number for number in tokens.vocabulary.tokens if number < tokens.rows) or range(
                    tokens.rows
                )
                terms.append([(0, number, 1 / len(named)) for number in named])
            else:
                terms.append([(order[model], row, 1 / len(made.terms)) for model, row in made.terms])
        return RowMap(index, MadeRows.of(terms))


def map_rows(recipe: Recipe, models: Sequence[Tokens], out: OutputVocabulary) -> list[ModelRows]:
    """Map the rows of every model to those of the output.

    A model keeps its own row of a token. What it lacks is taken from the base, else from the only model that has it;
    else it is the mean of the rows of all models that have it. For a token that no model has, each model takes the mean
    of all its rows (zeros with `compat: mergekit`). Rules of the recipe for single tokens come first. Rows without a
    token are matched by their number.

    Args:
        recipe: The recipe.
        models: The tokens of the models whose rows are merged, each once.
        out: The output's vocabulary.

    Raises:
        RecipeError: A rule names a token or a row that its model does not have.
    """
    own = np.stack([_own_rows(tokens, out) for tokens in models])
    base = next((i for i, tokens in enumerate(models) if tokens.reference == recipe.base_model), None)
    rules = {out.ids[rule.token]: (rule, _by_rule(rule, models)) for rule in recipe.token_rules}
    forced = [row for row, (rule, _) in rules.items() if rule.force]
    own[:, forced] = -1
    nobody = Made("zero", ()) if recipe.compat == "mergekit" else Made("mean of all rows", None)
    made: list[dict[int, Made]] = [{} for _ in models]
    for row in np.flatnonzero((own < 0).any(axis=0)).tolist():
        if row in rules:
            how = rules[row][1]
        else:
            owners = np.flatnonzero(own[:, row] >= 0).tolist()
            if base is not None and own[base, row] >= 0:
                owners = [base]
            terms = tuple((model, int(own[model, row])) for model in owners)
            how = Made("copy" if len(terms) == 1 else "mean", terms) if terms else nobody
        for i in np.flatnonzero(own[:, row] < 0).tolist():
            made[i][row] = how
    return [ModelRows(t.reference, own[i], made[i], _lost(t, out)) for i, t in enumerate(models)]


def _own_rows(tokens: Tokens, out: OutputVocabulary) -> Rows:
    own = np.full(out.rows, -1, np.int64)
    named = np.zeros(out.rows, bool)
    ids = tokens.ids
    for token, number in out.ids.items():
        row = ids.get(token, -1)
        if number < out.rows:
            named[number] = True
            own[number] = row if row < tokens.rows else -1
    free = np.ones(out.rows, bool)
    free[[number for number in tokens.vocabulary.tokens if number < out.rows]] = False
    free[tokens.rows :] = False
    nameless = np.flatnonzero(~named & free)
    own[nameless] = nameless
    return own


def _lost(tokens: Tokens, out: OutputVocabulary) -> dict[int, str]:
    return {n: t for n, t in tokens.vocabulary.tokens.items() if n < tokens.rows and t not in out.ids}


def _by_rule(rule: TokenRule, models: Sequence[Tokens]) -> Made:
    if rule.kind == "zero":
        return Made("zero", ())
    if rule.kind == "mean":
        return Made("mean of all rows", None)
    found = next((i for i, tokens in enumerate(models) if tokens.reference == rule.model), None)
    if found is None:
        raise RecipeError(f"{rule.place}: no row of {rule.model} is merged here, so none can be taken from it")
    tokens = models[found]
    if isinstance(rule.other, int):
        row, what = rule.other, f"row {rule.other}"
    else:
        token = rule.token if rule.other is None else rule.other
        if token not in tokens.ids:
            raise RecipeError(
                f"{rule.place}: {rule.model} has no token {shown_token(token)}.{did_you_mean(token, tokens.ids)}"
            )
        row, what = tokens.ids[token], f"token {shown_token(token)} at {tokens.ids[token]}"
    if row >= tokens.rows:
        raise RecipeError(f"{rule.place}: {what} is after the last of the {tokens.rows:,} rows of {rule.model}")
    return Made("copy", ((found, row),))
