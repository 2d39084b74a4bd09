"""PiToMe: tokens with many similar ones are merged, and those that stand alone are protected (Tran et al. 2024)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import elu, normalize

__all__ = ["pitome"]


def pitome(metric: Tensor, r: int, first: int, depth: float) -> tuple[Tensor, Tensor]:
    """Choose `r` tokens that go, and the token that each goes into.

        energy_i = mean_j elu(cos(m_i, m_j) - margin),   margin = 0.9 - 0.9 depth

    Of the 2 r tokens of the highest energy, in that order, every second one looks for the most similar of the others.

    Args:
        metric: Keys, averaged over heads, shape [batch, tokens, head_dim].
        r: Number of tokens that go, at most half of those that may.
        first: 1 if the first token is a class token, which is never merged; else 0.
        depth: Layers before this one over all layers.

    Returns:
        Indices of the tokens that go and of those that they go into, both of the shape [batch, r].
    """
    metric = normalize(metric[:, first:].float(), dim=-1)
    similar = metric @ metric.mT
    energy = elu(similar - (0.9 - 0.9 * depth)).mean(-1)
    order = energy.argsort(dim=-1, descending=True, stable=True)[:, : 2 * r]
    gone, others = order[:, ::2], order[:, 1::2]
    rows = similar.gather(1, gone[..., None].expand(-1, -1, similar.shape[-1]))
    best = rows.gather(2, others[:, None].expand(-1, r, -1)).argmax(-1)
    return gone + first, others.gather(1, best) + first
