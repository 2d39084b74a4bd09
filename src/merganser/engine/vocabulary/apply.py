"""Give the models of a merge one vocabulary: their embeddings and heads, matched by token."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...anatomy.settings.config import text_scopes
from ...checkpoint import TensorInfo
from ...checkpoint.derived.gathered import gathered
from ...errors import CheckpointError, UnsupportedError
from ...wording import some
from ..alignment.alignment import Member
from .mapping import ModelRows
from .tokens import Tokens

__all__ = ["indexed_tensors", "with_rows", "with_vocab_size"]

_HEAD_PART = re.compile(r"(^|\.)(lm_head|embed_out|output|predictions|decoder)\.(weight|bias)$")


def indexed_tensors(member: Member) -> dict[str, TensorInfo]:
    """Return the tensors of a model that have a row per token: embedding, head, and the head's bias.

    Raises:
        UnsupportedError: Another tensor outside the layers has as many rows or columns as the embedding has rows, so that
            it may be indexed by tokens, too.
    """
    anatomy, tensors = member.anatomy, member.checkpoint.tensors
    rows = anatomy.vocab_size
    if anatomy.embedding is None or rows is None:
        raise UnsupportedError(
            f"{member.reference}: has no embedding of tokens, so its rows cannot be matched by token"
        )
    found = {}
    unclear = []
    for name, tensor in tensors.items():
        part = anatomy.parts[name]
        if part.layer is not None or rows not in tensor.shape:
            continue
        known = (
            name in (anatomy.embedding, anatomy.head) or part.role in ("embedding", "head") or _HEAD_PART.search(name)
        )
        if known and tensor.shape[0] == rows:
            found[name] = tensor
        elif len(tensor.shape) > 1 and part.role != "position":
            unclear.append(name)
    if unclear:
        raise UnsupportedError(
            f"{member.reference}: {some(unclear)} may be indexed by tokens in a way that is not known here, so the vocabulary "
            "cannot be changed; leave 'tokenizer_source' and 'tokenizer' out of the recipe"
        )
    return found


def with_rows(members: Sequence[Member], tokens: Sequence[Tokens], rows: Sequence[ModelRows]) -> list[Member]:
    """Return the models with the rows of the output's vocabulary; nothing is read until they are merged.

    Args:
        members: The models whose rows are merged.
        tokens: Their tokens.
        rows: Where their rows come from.

    Raises:
        UnsupportedError: A model has a tensor of which it is not known whether tokens index it.
        CheckpointError: A row comes from a model that lacks the tensor, or holds it with other columns.
    """
    each = [indexed_tensors(member) for member in members]
    names = dict.fromkeys(name for found in each for name in found)
    result = []
    for i, (member, mine) in enumerate(zip(members, rows, strict=True)):
        order = [0] * len(members)
        used = sorted({model for made in mine.made.values() for model, _ in made.terms or ()} - {i})
        for place, model in enumerate(used, start=1):
            order[model] = place
        mapped = mine.row_map(tokens[i], order)
        tensors = dict(member.checkpoint.tensors)
        for name in names:
            own = each[i].get(name) or _tied(member, name, members)
            if own is not None:
                others = [_counterpart(members[model], name, own) for model in used]
                tensors[name] = gathered([own, *others], mapped, name=name)
        config = with_vocab_size(member.checkpoint.config, len(mapped.index), member.anatomy.vocab_size)
        checkpoint = replace(member.checkpoint, tensors=tensors, config=config)
        result.append(Member.of(member.reference, checkpoint))
    return result


def _tied(member: Member, name: str, members: Sequence[Member]) -> TensorInfo | None:
    """Return the embedding of a tied model where another model stores a head, whose new rows must come from heads."""
    stored = any(name == other.anatomy.head and not other.tied for other in members)
    return member.tensor(name) if stored and member.tied else None


def _counterpart(member: Member, name: str, own: TensorInfo) -> TensorInfo:
    found = member.tensor(name)
    if found is None:
        raise CheckpointError(f"{member.reference}: has no tensor {name!r}, from which rows are needed")
    if found.shape[1:] != own.shape[1:]:
        raise CheckpointError(
            f"{name}: rows of {member.reference} have shape {list(found.shape[1:])}, needed is {list(own.shape[1:])}; only "
            "models of one width can be merged"
        )
    return found


def with_vocab_size(config: Mapping[str, Any], rows: int, before: int | None) -> dict[str, Any]:
    """Return a config with the number of rows as its vocab_size, wherever it said the number of before."""
    result = copy.deepcopy(dict(config))
    scopes = [scope for scope in text_scopes(result) if "vocab_size" in scope]
    for scope in [scope for scope in scopes if scope["vocab_size"] == before] or scopes:
        scope["vocab_size"] = rows
    return result
