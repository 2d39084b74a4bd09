"""Statistics as they are defined: the whole model in memory, one sequence at a time, float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Rows = dict[str, list[Tensor]]


def rows_of(folder: Path, architecture: str, sequences: Sequence[dict[str, Tensor]]) -> Rows:
    """For every matrix, by its parameter's name, what it receives: a tensor [tokens, in] per sequence, float64.

    Experts are listed one by one, as `...gate_up_proj.3`.
    """
    model = getattr(transformers, architecture).from_pretrained(folder, experts_implementation="eager").eval()
    found: Rows = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: found[f"{name}.weight"].append(inputs[0].flatten(0, -2).double())
            )
        if hasattr(module, "_apply_gate"):
            module.register_forward_pre_hook(lambda own, inputs, name=name: _experts(found, name, own, *inputs))
    for inputs in sequences:
        with torch.no_grad():
            model(**inputs)
    return found


def _experts(found: Rows, name: str, module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> None:
    for token, experts in enumerate(indices):
        for expert in experts.tolist():
            row = hidden[token]
            found[f"{name}.gate_up_proj.{expert}"].append(row[None].double())
            weight = module.gate_up_proj[expert]
            inner = row @ weight if module.is_transposed else weight @ row
            if module.has_bias:
                inner = inner + module.gate_up_proj_bias[expert]
            found[f"{name}.down_proj.{expert}"].append(module._apply_gate(inner[None]).double())


def gram(rows: Sequence[Tensor]) -> Tensor:
    """`Σ x xᵀ`."""
    return sum((torch.einsum("ti,tj->ij", own, own) for own in rows), torch.zeros(()))


def gradients_of(
    folder: Path, architecture: str, sequences: Sequence[dict[str, Tensor]], counted: Sequence[Tensor] | None = None
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """The gradients of the whole model's loss, sequence by sequence, and the losses; float64.

    Args:
        folder: The model.
        architecture: Its class.
        sequences: Arguments of the model.
        counted: For each sequence which tokens count; all if not given.
    """
    model = getattr(transformers, architecture).from_pretrained(folder, experts_implementation="eager").eval().double()
    gradients, losses = [], []
    for number, inputs in enumerate(sequences):
        model.zero_grad()
        ids = inputs.get("decoder_input_ids", inputs["input_ids"])[0]
        scores = torch.log_softmax(model(**inputs, use_cache=False).logits[0], dim=-1)
        terms = [-scores[i, ids[i + 1]] for i in range(len(ids) - 1) if counted is None or counted[number][i + 1]]
        loss = sum(terms, torch.zeros((), dtype=torch.float64))
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return gradients, losses
