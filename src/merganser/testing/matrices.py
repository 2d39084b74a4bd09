"""Laws of the contract suite for methods that work on matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..method import MergeMethod
from ..method.method import fill
from .cases import SHAPE, defaults, make_inputs, merge

_REST: list[tuple[tuple[int, ...], str]] = [
    ((), "other"),
    ((37,), "norm"),
    ((3, 4, 5), "conv"),
    (SHAPE, "norm"),
    (SHAPE, "embedding"),
    (SHAPE, "head"),
]


def leaves_the_rest(method: MergeMethod) -> None:
    """Tensors that are not matrices are merged as `others` says, and embeddings and head as `embeddings` says."""
    given = next(defaults(method))[1]
    for others in ("average", "sum", "base"):
        chosen = {**given, "others": others, "embeddings": "others"}
        for shape, role in _REST:
            base, models = make_inputs(method, True, shape)
            assert base is not None
            merged = merge(method, (base, models), chosen, role=role)
            torch.testing.assert_close(merged, _beside(method, base, models, chosen), rtol=1e-6, atol=1e-6)
    base, models = make_inputs(method, True)
    matrix = merge(method, (base, models), given)
    for role in ("embedding", "head"):
        table = merge(method, (base, models), {**given, "embeddings": "matrix"}, role=role)
        if not torch.equal(table, matrix):
            raise AssertionError(f"{method.name}: with embeddings: matrix a matrix and a table of tokens differ")


def _beside(method: MergeMethod, base: Tensor, models: list[Tensor], given: dict[str, object]) -> Tensor:
    filled = fill(method, given, len(models))
    if filled["others"] == "base":
        return base
    weight = torch.tensor(filled.get("weight", 1.0)).expand(len(models))
    total = sum((w * (model - base) for w, model in zip(weight, models, strict=True)), torch.zeros_like(base))
    factor: float = filled.get("lambda", 1.0)
    return base + factor * (total / weight.sum() if filled["others"] == "average" else total)


def merges_each_expert(method: MergeMethod) -> None:
    """Each expert of a packed tensor is merged as a matrix alone (unless they share random draws or a statistic)."""
    if method.random or method.statistics:
        return
    for _, parameters in defaults(method):
        base, models = make_inputs(method, True, (3, *SHAPE))
        assert base is not None
        packed = merge(method, (base, models), parameters, role="expert")
        each = [merge(method, (base[i], [model[i] for model in models]), parameters) for i in range(3)]
        if not torch.equal(packed, torch.stack(each)):
            raise AssertionError(f"{method.name}: a packed expert is not merged as it is alone")
