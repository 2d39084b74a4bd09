"""One embedding and one head for experts of unequal widths, and linear projections between them and each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....errors import NonFiniteError, UnsupportedError

__all__ = ["Tables", "check_linear", "least_squares", "make_tables", "mean_table", "table_of"]

_RIDGE = 1e-10
"""Of the least squares, relative to the mean square of a column: only so much that a rank too low does no harm."""

_ROWS = 8192
"""Rows of tables that are converted to float64 at a time."""


@dataclass
class Tables:
    """The shared embedding and head, and the projections.

    Args:
        embedding: The average of the experts' embeddings, padded with zeros, shape [vocabulary, width].
        head: That of their heads.
        into: Of each expert, from the shared embedding to its own width, float32, shape [width, own].
        out: Of each expert, from its last hidden states to the shared head, float32, shape [own, width].
        biases: Of each expert, what its head adds to the logits, shape [vocabulary]; None without one.
    """

    embedding: Tensor
    head: Tensor
    into: list[Tensor]
    out: list[Tensor]
    biases: list[Tensor | None]

    def embed(self, expert: int, ids: Tensor) -> Tensor:
        """Return what an expert's layers read, shape [rows, length, own]."""
        found = torch.nn.functional.embedding(ids, self.embedding)
        return found @ self.into[expert].to(found.dtype)

    def leave(self, expert: int, states: Tensor) -> Tensor:
        """Return an expert's last hidden states in the shared width."""
        return states @ self.out[expert].to(states.dtype)

    def logits(self, states: Tensor, weights: Tensor) -> Tensor:
        """Return the logits of mixed states.

        Args:
            states: Shape [rows, length, width].
            weights: Of the experts, shape [rows, length, experts].
        """
        found = states.to(self.head.dtype) @ self.head.T
        for number, bias in enumerate(self.biases):
            if bias is not None:
                found = found + weights[..., number, None].to(found.dtype) * bias
        return found


def table_of(model: Any, vocabulary: int) -> Tensor:
    """Return what a model makes of each token, before its layers: shape [vocabulary, own]."""
    module = model.get_input_embeddings()
    with torch.no_grad():
        # some scale their embeddings, so the module is asked
        found: Tensor = module(torch.arange(vocabulary, device=module.weight.device))
    return found


def mean_table(tables: Sequence[Tensor]) -> Tensor:
    """Return the average of tables, padded with zeros to the largest width, in float32.

    Args:
        tables: Shapes [rows, own].
    """
    width = max(table.shape[1] for table in tables)
    total = torch.zeros(tables[0].shape[0], width, device=tables[0].device)
    for table in tables:
        total[:, : table.shape[1]] += table.float()
    return total / len(tables)


def least_squares(shared: Tensor, own: Tensor) -> Tensor:
    """Return the matrix P for which `shared @ P` is nearest to `own`, computed in float64.

    Args:
        shared: Shape [rows, width].
        own: Shape [rows, own].

    Returns:
        float32, shape [width, own].

    Raises:
        NonFiniteError: A table has NaN or infinity.
    """
    width = shared.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=shared.device)
    mixed = torch.zeros(width, own.shape[1], dtype=torch.float64, device=shared.device)
    for start in range(0, len(shared), _ROWS):
        left, right = (table[start : start + _ROWS].double() for table in (shared, own))
        gram += left.T @ left
        mixed += left.T @ right
    scale = gram.diagonal().mean() * _RIDGE
    factor, failed = torch.linalg.cholesky_ex(gram + scale * torch.eye(width, dtype=gram.dtype, device=gram.device))
    # in the order in which files are read: products with a matrix in another order differ in their last bits
    found = torch.cholesky_solve(mixed, factor).float().contiguous()
    if failed or not found.isfinite().all():
        raise NonFiniteError("the least squares between the embeddings or heads of the experts give NaN or infinity")
    return found


def make_tables(models: Sequence[Any], vocabulary: int, dtype: torch.dtype) -> Tables:
    """Average embeddings and heads, and solve the projections that come nearest to each expert's own.

    Args:
        models: The experts, models of transformers.
        vocabulary: Number of tokens.
        dtype: Of the shared tables.

    Raises:
        NonFiniteError: A table has NaN or infinity.
    """
    inputs = [table_of(model, vocabulary) for model in models]
    heads = [model.get_output_embeddings() for model in models]
    outputs = [head.weight.detach()[:vocabulary] for head in heads]
    embedding, head = mean_table(inputs), mean_table(outputs)
    found = [getattr(each, "bias", None) for each in heads]
    return Tables(
        embedding.to(dtype),
        head.to(dtype),
        [least_squares(embedding, own) for own in inputs],
        # head @ out.T is nearest to the expert's own head
        [least_squares(head, own).T.contiguous() for own in outputs],
        [None if bias is None else bias.detach()[:vocabulary] for bias in found],
    )


@torch.no_grad()
def check_linear(name: str, model: Any, vocabulary: int) -> None:
    """Check that a model is its embedding, its layers and its head, one behind the other, with nothing between them.

    Raises:
        UnsupportedError: It is not.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise UnsupportedError(f"{name}: its head is not a linear layer, so it cannot be shared; use embeddings 'own'")
    ids = torch.arange(min(vocabulary, 8), device=head.weight.device)[None]
    wanted = model(input_ids=ids, use_cache=False).logits.float()
    states = model.base_model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).last_hidden_state
    if states.shape[-1] != head.weight.shape[1]:
        raise UnsupportedError(f"{name}: its head does not read its last hidden states; use embeddings 'own'")
    # one rounding of the dtype, at the size of the logits
    room = 16 * torch.finfo(head.weight.dtype).eps * float(wanted.abs().max())
    if float((head(states).float() - wanted).abs().max()) > room:
        raise UnsupportedError(
            f"{name}: {type(model).__name__} changes its embeddings or logits outside of its layers (by a scale or a bound), so "
            "they cannot be shared; use embeddings 'own'"
        )
