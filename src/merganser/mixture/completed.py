"""Tensors that an architecture has and the dense model lacks: biases of zeros, and a head that is a copy of the embedding.

transformers would load the mixture without them, as its config says so; vLLM and llama.cpp expect what every published
checkpoint of the architecture has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..anatomy import infer_anatomy
from ..checkpoint import Checkpoint, derive
from ..checkpoint.tensor import ByteReader
from ..engine.new_tensors import copied_from
from ..engine.plan.tensor import PlannedTensor
from ..errors import UnsupportedError
from .architectures import Layout

__all__ = ["completed"]

_BIASED = (".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".self_attn.v_proj.weight")
_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class _Zeros:
    """The values of a bias that no file holds."""

    size: int

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        return torch.zeros(end - first, self.size)


def completed(
    drafts: Sequence[PlannedTensor], layout: Layout, base: Checkpoint, config: Mapping[str, Any]
) -> list[PlannedTensor]:
    """Return the tensors of a mixture with those that its architecture has and the dense model lacks.

    Args:
        drafts: The tensors.
        layout: The architecture.
        base: The dense model.
        config: config.json of the dense model, as the plan has it.

    Raises:
        UnsupportedError: The dense model has biases that the architecture cannot hold.
    """
    names = {draft.name for draft in drafts}
    found = []
    for draft in drafts:
        found.append(draft)
        bias = f"{draft.name.removesuffix('.weight')}.bias"
        if layout.biased and draft.name.endswith(_BIASED) and bias not in names:
            found.append(_zero_bias(draft, base, bias))
        if layout.biased and draft.name.endswith(".self_attn.o_proj.bias"):
            raise UnsupportedError(
                f"{base.reference}: has {draft.name}, and {layout.name} has biases of queries, keys and values alone"
            )
    if layout.untied and _HEAD not in names:
        embedding = infer_anatomy({draft.name: draft.shape for draft in drafts}, config).embedding
        found += [replace(draft, name=_HEAD, role="head") for draft in drafts if draft.name == embedding]
    return found


def _zero_bias(weight: PlannedTensor, base: Checkpoint, name: str) -> PlannedTensor:
    shape = weight.shape[:1]
    info = derive(name, shape, [base.tensors[weight.name]], _Zeros(shape[0]), natural=weight.dtype)
    return copied_from(weight, info, name=name)
