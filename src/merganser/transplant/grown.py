"""A model whose own tokenizer gets more tokens, with rows made from rows that the model has."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.derived.gathered import MadeRows, RowMap, gathered
from ..checkpoint.dtypes import DTYPES
from ..checkpoint.tensor import ByteReader, TensorInfo
from ..engine.alignment.alignment import Member
from ..engine.vocabulary.apply import indexed_tensors, with_vocab_size
from ..engine.vocabulary.mapping import Made, ModelRows
from ..engine.vocabulary.match import Matched
from ..engine.vocabulary.output import extended
from ..engine.vocabulary.report import describe
from ..engine.vocabulary.tokens import Tokens
from ..tokenizer.union import Extension
from ..tokenizer.vocabulary import Vocabulary

__all__ = ["Sources", "grown"]

Sources = Mapping[int, Sequence[int]]
"""For the id of each new token, the rows whose mean its row is."""

Values = npt.NDArray[np.float32]


def grown(
    member: Member,
    model: Tokens,
    extension: Extension,
    rows: Sources,
    *,
    kind: str,
    settings: Mapping[str, Any],
    trained: Mapping[str, Values] | None = None,
) -> Matched:
    """Return a model with more tokens; its own rows stay where they are.

    Args:
        member: The model.
        model: Its tokens.
        extension: What its tokenizer gets; its new tokens follow the last id of the model.
        rows: The rows that the new ones are means of, by their ids.
        kind: How rows are made, for the report.
        settings: What decides how they are made, for the record.
        trained: Rows of new tokens that are given, for some of the tensors, by name; float32, shape [new, width].

    Raises:
        UnsupportedError: The tokenizer has no tokenizer.json, or it is not known which tensors tokens index.
        CheckpointError: The tokenizer has no place for more tokens.
    """
    out = extended(model, extension, max(model.rows, model.last + 1 + len(extension.tokens)))
    new = [token.id for token in extension.tokens.values()]
    own = np.full(out.rows, -1, np.int64)
    own[: model.rows] = np.arange(model.rows)
    # ids after the last token may be rows of padding, which the new tokens take
    own[new] = -1
    index = own.copy()
    index[new] = -1 - np.arange(len(new))
    mapped = RowMap(index, MadeRows.of([[(0, row, 1 / len(rows[each])) for row in rows[each]] for each in new]))
    tensors = dict(member.checkpoint.tensors)
    given = trained or {}
    for name, tensor in indexed_tensors(member).items():
        tensors[name] = _with_values(tensor, index, given[name]) if name in given else gathered([tensor], mapped)
    kinds = {each: Made(kind, tuple((0, row) for row in rows[each])) for each in new}
    config = with_vocab_size(member.checkpoint.config, out.rows, member.anatomy.vocab_size)
    changed = Member.of(member.reference, replace(member.checkpoint, tensors=tensors, config=config))
    change, _ = describe(out, [model], [ModelRows(member.reference, own, kinds, {})], settings=settings)
    parts: list[npt.NDArray[Any]] = [mapped.made.starts, mapped.made.row, mapped.made.weight, *given.values()]
    digest = hashlib.sha256(b"\0".join([change.digest.encode(), *(part.tobytes() for part in parts)]))
    vocabulary = Vocabulary({number: token for token, number in out.ids.items()}, frozenset(), "tokenizer.json")
    change = replace(change, digest=digest.hexdigest())
    return Matched({member.reference: changed}, member, change, vocabulary, {}, out.warnings)


def _with_values(tensor: TensorInfo, index: npt.NDArray[np.int64], values: Values) -> TensorInfo:
    """Return a tensor with new rows that are given; `index` counts them from -1 down."""
    rows = MadeRows.of([[(1, row, 1.0)] for row in range(len(values))])
    return gathered([tensor, _given(tensor, values)], RowMap(index, rows))


def _given(tensor: TensorInfo, values: Values) -> TensorInfo:
    """Return values in memory as a tensor beside another one."""
    dtype = DTYPES["F32"]
    shape = (len(values), *tensor.shape[1:])
    return replace(
        tensor,
        dtype=dtype,
        shape=shape,
        offset=-1,
        nbytes=dtype.nbytes(math.prod(shape)),
        source=_Given(np.ascontiguousarray(values, dtype=np.float32)),
    )


@dataclass(frozen=True, eq=False)
class _Given:
    """The source of a tensor whose values are in memory."""

    values: Values

    def read_into(self, reader: ByteReader, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with bytes of the tensor, beginning at byte `start`."""
        buffer[:] = self.values.reshape(-1).view(np.uint8)[start : start + len(buffer)].data
