"""MergeME (Zhou et al. 2025) for experts of unequal sizes, written out in float64 for one text.

The paper: embedding and head are averages of the experts' matrices, padded with zeros to the largest width; each expert has
a projection in front of its layers and one behind them; a = softmax(top-K(scores)), with the scores of a router on the mean
embedding, or 1 / perplexity; output = head(sum_k a_k r_k). Projections here are the least squares between the tables.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def padded_average(tables: list[torch.Tensor]) -> torch.Tensor:
    width = max(table.shape[1] for table in tables)
    rows = min(len(table) for table in tables)
    total = torch.zeros(rows, width, dtype=torch.float64)
    for table in tables:
        for column in range(table.shape[1]):
            total[:, column] += table[:rows, column].double() / len(tables)
    return total


def chosen(scores: list[float], top: int) -> list[float]:
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[:top]
    total = sum(math.exp(scores[k]) for k in order)
    return [math.exp(scores[k]) / total if k in order else 0.0 for k in range(len(scores))]


def perplexity(logits: torch.Tensor, ids: list[int]) -> float:
    nats = [-float(logits[t].log_softmax(-1)[ids[t + 1]]) for t in range(len(ids) - 1)]
    return math.exp(sum(nats) / len(nats)) if nats else 1.0


class Mixture:
    """Experts in float64."""

    def __init__(self, experts: list[Any], shared: bool, top: int, router: tuple[torch.Tensor, torch.Tensor] | None):
        self.experts = [expert.double() for expert in experts]
        self.shared, self.top, self.router = shared, top, router
        inputs = [expert.get_input_embeddings().weight.detach() for expert in experts]
        heads = [expert.get_output_embeddings().weight.detach() for expert in experts]
        self.rows = min(map(len, inputs))
        self.embedding, self.head = padded_average(inputs), padded_average(heads)
        rows = self.rows
        self.into = [torch.linalg.pinv(self.embedding) @ table[:rows].double() for table in inputs]
        self.out = [(torch.linalg.pinv(self.head) @ table[:rows].double()).T for table in heads]

    def each(self, k: int, ids: list[int]) -> torch.Tensor:
        """What expert k gives: logits; or, where the tables are shared, states before the shared head."""
        with torch.no_grad():
            if not self.shared:
                return self.experts[k](torch.tensor([ids])).logits[0, :, : self.rows]
            read = self.embedding[ids] @ self.into[k]
            return self.experts[k].base_model(inputs_embeds=read[None]).last_hidden_state[0] @ self.out[k]

    def finished(self, output: torch.Tensor) -> torch.Tensor:
        return output @ self.head.T if self.shared else output

    def weights(self, ids: list[int]) -> list[float]:
        if self.router is not None:
            mean = self.embedding[ids].mean(0)
            return chosen((self.router[0].double() @ mean + self.router[1].double()).tolist(), self.top)
        count = range(len(self.experts))
        return chosen([1 / perplexity(self.finished(self.each(k, ids)), ids) for k in count], self.top)

    def next(self, ids: list[int], prompt: int) -> torch.Tensor:
        """Logits behind the last token, with the weights of the first `prompt` tokens."""
        weights = self.weights(ids[:prompt])
        return self.finished(sum(a * self.each(k, ids)[-1] for k, a in enumerate(weights)))
