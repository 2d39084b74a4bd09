"""Give one model the vocabulary of a donor: shared tokens keep their rows, the others are approximated."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checkpoint import Reader, TensorInfo
from ..checkpoint.derived.gathered import MadeRows, RowMap, gathered
from ..engine.alignment.alignment import Member
from ..engine.vocabulary.apply import indexed_tensors, with_vocab_size
from ..engine.vocabulary.mapping import Made, ModelRows
from ..engine.vocabulary.match import Matched, open_owner, with_ids
from ..engine.vocabulary.output import OutputVocabulary
from ..engine.vocabulary.report import describe
from ..engine.vocabulary.tokens import Tokens, read_tokens
from ..errors import CheckpointError, NonFiniteError
from ..process import one_thread
from ..recipe import ModelReference, Recipe
from .approximate import METHODS
from .pieces import cut_into_pieces
from .shared import shared_rows

__all__ = ["match_tokenizer", "tokens_of"]

_FEWEST = 16
"""Shared tokens that an approximation needs at least."""

Terms = Mapping[int, Sequence[tuple[int, float]]]
"""For each new token's id, rows of the model and their coefficients."""

Rows = NDArray[np.int64]


def match_tokenizer(
    recipe: Recipe,
    members: Mapping[ModelReference, Member],
    cache_dir: Path | None = None,
    *,
    settings: Mapping[str, Any],
    threads: int | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> Matched:
    """Return the recipe's only model with the rows of the tokenizer that the recipe names.

    Args:
        recipe: It has one model, and names the donor as its `tokenizer_source`.
        members: The model.
        cache_dir: Folder for models from the Hub.
        settings: The method, and its `k`.
        threads: Threads that compute; by default one per core, at most 8.
        advance: Called with the number of tokens done, and of all.

    Raises:
        CheckpointError: The donor lacks weights or a tokenizer, or the two share too few tokens.
        UnsupportedError: One of the two has no tokenizer.json.
    """
    [member] = members.values()
    assert recipe.tokenizer_donor is not None
    own_tokenizer = recipe.tokenizer_donor == member.reference
    owner = member if own_tokenizer else open_owner(recipe.tokenizer_donor, "--tokenizer", cache_dir)
    donor, model = tokens_of(owner), tokens_of(member)
    shared = shared_rows(donor, model)
    rows = max(donor.rows, donor.last + 1)
    method = METHODS[settings["method"]]
    if method.solve is not None and len(shared) < _FEWEST:
        raise CheckpointError(
            f"{donor.reference} and {model.reference} share {len(shared)} tokens, too few to tell what the others mean; "
            "--method subword needs none"
        )
    solver = _Solver(
        owner=owner,
        donor=donor,
        member=member,
        model=model,
        shared=shared,
        settings=settings,
        threads=threads,
        advance=advance,
    )
    own = _known_rows(shared, donor, model, rows)
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    maps, kinds = _row_maps(member, model, solver, own)
    for mapped in maps.values():
        digest.update(
            b"".join(a.tobytes() for a in (mapped.index, mapped.made.starts, mapped.made.row, mapped.made.weight))
        )
    held = member.checkpoint.tensors
    tensors = {**held, **{name: gathered([held[name]], mapped) for name, mapped in maps.items()}}
    config = with_vocab_size(member.checkpoint.config, rows, member.anatomy.vocab_size)
    changed = Member.of(member.reference, replace(member.checkpoint, tensors=tensors, config=config))
    kept = set(shared.values())
    lost = {n: t for n, t in model.vocabulary.tokens.items() if n < model.rows and n not in kept}
    out = OutputVocabulary(owner.reference, donor.ids, rows)
    change, _ = describe(out, [model], [ModelRows(member.reference, own, kinds, lost)], settings=settings)
    digest.update(change.report)
    places = {row: number for number, row in shared.items()}
    moved = {n: places.get(n) for n in model.vocabulary.tokens if places.get(n) != n}
    changed = with_ids(changed, moved, recipe)
    return Matched({member.reference: changed}, owner, replace(change, digest=digest.hexdigest()), moved=moved)


def _known_rows(shared: Mapping[int, int], donor: Tokens, model: Tokens, rows: int) -> Rows:
    """Return for each row of the output the row of the model that it is; -1 for that of a new token."""
    own = np.full(rows, -1, np.int64)
    own[list(shared)] = list(shared.values())
    # rows without a token, such as padding, are matched by their number
    named = {*donor.vocabulary.tokens, *model.vocabulary.tokens}
    nameless = [row for row in range(min(rows, model.rows)) if row not in named]
    own[nameless] = nameless
    return own


def _row_maps(member: Member, model: Tokens, solver: _Solver, own: Rows) -> tuple[dict[str, RowMap], dict[int, Made]]:
    """Return what the rows of each tensor of tokens are made of, and how each new row of the embedding is made."""
    mean = sorted(number for number in model.vocabulary.tokens if number < model.rows)
    maps: dict[str, RowMap] = {}
    kinds: dict[int, Made] = {}
    for name, tensor in indexed_tensors(member).items():
        terms = solver.terms(name, tensor)
        maps[name] = _row_map(own, terms, mean)
        if name == member.anatomy.embedding:
            kinds = {row: _kind(terms.get(row)) for row in np.flatnonzero(own < 0).tolist()}
    return maps, kinds


def tokens_of(member: Member) -> Tokens:
    """Return the tokens of a model.

    Raises:
        CheckpointError: It has no tokenizer that can be read.
    """
    found = read_tokens(member)
    if found is None:
        raise CheckpointError(
            f"{member.reference}: has no tokenizer whose tokens can be read; a tokenizer.json is needed"
        )
    return found


def _kind(terms: Sequence[tuple[int, float]] | None) -> Made:
    if terms is None:
        return Made("mean of all rows", None)
    return Made("combined" if terms else "zero", ())


def _row_map(own: Rows, terms: Terms, mean: Sequence[int]) -> RowMap:
    """Return which row of the model, or which combination, each row is; rows without terms are the mean of all."""
    index = own.copy()
    made: list[Sequence[tuple[int, int, float]]] = [[(0, row, 1 / len(mean)) for row in mean]]
    for row in np.flatnonzero(own < 0).tolist():
        if row in terms:
            index[row] = -1 - len(made)
            made.append([(0, each, weight) for each, weight in terms[row]])
        else:
            index[row] = -1
    return RowMap(index, MadeRows.of(made))


@dataclass(eq=False)
class _Solver:
    """Finds the terms of the new tokens for each tensor of the model."""

    owner: Member
    donor: Tokens
    member: Member
    model: Tokens
    shared: Mapping[int, int]
    settings: Mapping[str, Any]
    threads: int | None
    advance: Callable[[int, int], None] | None

    @cached_property
    def new(self) -> dict[int, str]:
        """The donor's tokens that the model lacks, by id, in order."""
        ordered = sorted(self.donor.ids.items(), key=lambda item: item[1])
        return {number: token for token, number in ordered if number not in self.shared}

    def terms(self, name: str, tensor: TensorInfo) -> Terms:
        """Return rows and coefficients for each new token; for tokens that are left out, the mean of all rows is meant."""
        method = METHODS[self.settings["method"]]
        if method.name == "zero":
            return dict.fromkeys(self.new, ())
        if method.name == "mean" or len(tensor.shape) < 2:
            return {}
        if method.solve is None:
            pieces = cut_into_pieces(self.donor, self.model, self.new)
            return {n: [(row, 1 / len(rows)) for row in rows] for n, rows in pieces.items()}
        with one_thread():
            return self._solved(self._donor_tensor(name))

    def _donor_tensor(self, name: str) -> TensorInfo:
        """Return the donor's embedding for the model's embedding, and its head for the head; one matrix if it is tied."""
        anatomy, held = self.owner.anatomy, self.owner.checkpoint.tensors
        wanted = anatomy.head if name == self.member.anatomy.head and anatomy.head in held else anatomy.embedding
        if wanted is None:
            raise CheckpointError(
                f"{self.owner.reference}: has no weights, and --method {self.settings['method']} looks at its embedding; "
                "--method subword does not"
            )
        return held[wanted]

    def _solved(self, tensor: TensorInfo) -> Terms:
        method, k = METHODS[self.settings["method"]], self.settings["k"]
        limit = tensor.shape[0]
        shared = [number for number in self.shared if number < limit]
        new = [number for number in self.new if number < limit]
        with Reader() as reader:
            values = reader.tensor(tensor)
        atoms, targets = values[shared].float(), values[new].float()
        for part in (atoms, targets):
            if not torch.isfinite(part).all():
                raise NonFiniteError(f"{tensor.file}: tensor {tensor.name!r} holds NaN or infinity")
        del values
        assert method.solve is not None
        if method.name == "omp":
            done = _Counter(len(new), self.advance)
            threads = self.threads or _cores()
            indices, weights = method.solve(targets, atoms, k, threads=threads, advance=done)
        else:
            indices, weights = method.solve(targets, atoms, k)
        return self._terms(new, torch.tensor([self.shared[number] for number in shared])[indices], weights)

    def _terms(self, new: Sequence[int], rows: Tensor, weights: Tensor) -> Terms:
        listed = zip(new, rows.tolist(), weights.tolist(), strict=True)
        return {n: [(row, w) for row, w in zip(r, c, strict=True) if w] for n, r, c in listed}


class _Counter:
    """Adds up the tokens that threads report."""

    def __init__(self, total: int, advance: Callable[[int, int], None] | None) -> None:
        self._total, self._advance, self._done = total, advance, 0

    def __call__(self, count: int) -> None:
        self._done += count
        if self._advance is not None:
            self._advance(self._done, self._total)


def _cores() -> int:
    return min(os.cpu_count() or 1, 8)
