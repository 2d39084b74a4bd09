"""BAM, one layer of a Llama in float64: arrays have a row per token.

Zhang et al. 2024, arXiv:2408.08274, sections 3.4, 4.1 and 4.2; the one MLP of a token has weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def norm(x: Array, weight: Array, epsilon: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def turned(x: Array, theta: float) -> Array:
    """Rotary positions 0, 1, 2, ...: x has the shape [tokens, width]."""
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], 1
    )


def attention(x: Array, own: Mapping[str, Array], heads: int, key_heads: int, theta: float) -> Array:
    width = len(own["q_proj"]) // heads
    found = []
    for head in range(heads):
        group = head * key_heads // heads
        rows, key_rows = slice(head * width, head * width + width), slice(group * width, group * width + width)
        queries = turned(x @ own["q_proj"][rows].T, theta)
        keys = turned(x @ own["k_proj"][key_rows].T, theta)
        scores = queries @ keys.T / np.sqrt(width)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        found.append(softmax(scores) @ (x @ own["v_proj"][key_rows].T))
    return np.concatenate(found, 1) @ own["o_proj"].T


def mlp(x: Array, own: Mapping[str, Array]) -> Array:
    gate = x @ own["gate_proj"].T
    return (gate / (1 + np.exp(-gate)) * (x @ own["up_proj"].T)) @ own["down_proj"].T


def layer(
    x: Array,
    experts: Sequence[Mapping[str, Array]],
    norms: tuple[Array, Array],
    routers: tuple[tuple[Array, Array], tuple[Array, Array]],
    *,
    heads: int,
    key_heads: int,
    theta: float,
    epsilon: float,
) -> Array:
    """One layer: `routers` are weight and bias of the attention's, and of the MLP's."""
    read = norm(x, norms[0], epsilon)
    shares = softmax(read @ routers[0][0].T + routers[0][1])
    for number, own in enumerate(experts):
        x = x + shares[:, number, None] * attention(read, own, heads, key_heads, theta)
    read = norm(x, norms[1], epsilon)
    chosen = (read @ routers[1][0].T + routers[1][1]).argmax(-1)
    return x + np.stack([mlp(read[[token]], experts[chosen[token]])[0] for token in range(len(x))])
