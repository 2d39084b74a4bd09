"""Dynamic tokens: frequent pairs of tokens of a batch become one input each (Feher, Vulic and Minixhofer 2024)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from ..errors import ParameterError
from ..tokenizer.pairs import Pairs

__all__ = ["embed_groups", "merge_words"]

Groups = list[list[tuple[int, ...]]]
"""For each sequence, its tokens in groups; each group is one input of the model."""


def merge_words(
    ids: Sequence[Sequence[int]], words: Sequence[Sequence[int | None]], merges: int, *, least: int = 1
) -> Groups:
    """Merge the most frequent pairs of neighbouring tokens in the words of a batch, one pair after another.

    Counted over all sequences together, as byte-pair encoding is trained; the batch decides alone, no vocabulary does.
    With more merges than there are pairs, every word is one group.

    Source: arXiv:2411.18553, and the authors' `Dynamic_BPE.tokenize_batch`. Of equally frequent pairs they take the one
    that occurs first, here it is that of the lower ids.

    Args:
        ids: The token ids of each sequence.
        words: For each token the word that it belongs to, as `word_ids()` of a fast tokenizer's encoding says it; None for
            tokens that stay alone, such as special ones.
        merges: Number of merges, at least 0.
        least: How often a pair must occur.

    Returns:
        The ids in groups, in their order.

    Raises:
        ParameterError: A number is out of range, or a sequence has not as many words as tokens.
    """
    if merges < 0 or least < 1:
        raise ParameterError(f"merge_words: merges {merges}, least {least}: must be at least 0 and at least 1")
    if [len(own) for own in ids] != [len(own) for own in words]:
        raise ParameterError("merge_words: ids and words must have equal lengths")
    cut = [_cut(own, numbers) for own, numbers in zip(ids, words, strict=True)]
    pairs = Pairs(Counter(word for sequence in cut for word in sequence if len(word) > 1))
    fresh = start = 1 + max((number for sequence in ids for number in sequence), default=0)
    parts: dict[int, tuple[int, ...]] = {}
    while fresh - start < merges and (best := pairs.best()) is not None and best[1] >= least:
        parts[fresh] = tuple(number for each in best[0] for number in parts.get(each, (each,)))
        pairs.merge(best[0], fresh)
        fresh += 1
    merged = pairs.words()
    return [[parts.get(token, (token,)) for word in sequence for token in merged.get(word, word)] for sequence in cut]


def _cut(ids: Sequence[int], words: Sequence[int | None]) -> list[tuple[int, ...]]:
    """Return the words of a sequence; tokens without a word alone."""
    keys = [(-1 - place if word is None else word) for place, word in enumerate(words)]
    grouped = groupby(zip(keys, ids, strict=True), key=lambda each: each[0])
    return [tuple(int(number) for _, number in group) for _, group in grouped]


def embed_groups(groups: Groups, embedding: nn.Module, *, side: str = "right") -> dict[str, Tensor]:
    """Return the inputs of a model for tokens in groups: for each group the mean of its tokens' embeddings.

    Args:
        groups: From `merge_words`, or any groups of token ids.
        embedding: The embedding of the model: `model.get_input_embeddings()`.
        side: Where shorter sequences are padded: "right", or "left" to generate.

    Returns:
        `inputs_embeds`, [batch, groups, hidden size] in the dtype of the embedding, zeros where padded; and
        `attention_mask`, [batch, groups], int64.

    Raises:
        ParameterError: The side is not known, or there is a group without tokens.
    """
    if side not in ("left", "right"):
        raise ParameterError(f"embed_groups: side {side!r} is not known; known are 'left' and 'right'")
    if not all(group for sequence in groups for group in sequence):
        raise ParameterError("embed_groups: a group has no tokens")
    device = next(embedding.parameters()).device
    flat = [group for sequence in groups for group in sequence]
    sizes = torch.tensor([len(group) for group in flat], device=device)
    tokens = torch.tensor([token for group in flat for token in group], dtype=torch.int64, device=device)
    vectors = embedding(tokens)
    place = torch.repeat_interleave(torch.arange(len(flat), device=device), sizes)
    sums = torch.zeros(len(flat), vectors.shape[-1], device=device).index_add(0, place, vectors.float())
    means = (sums / sizes[:, None]).to(vectors.dtype)
    longest = max((len(sequence) for sequence in groups), default=0)
    inputs = means.new_zeros(len(groups), longest, means.shape[-1])
    mask = torch.zeros(len(groups), longest, dtype=torch.int64, device=device)
    start = 0
    for row, sequence in enumerate(groups):
        at = longest - len(sequence) if side == "left" else 0
        inputs[row, at : at + len(sequence)] = means[start : start + len(sequence)]
        mask[row, at : at + len(sequence)] = 1
        start += len(sequence)
    return {"inputs_embeds": inputs, "attention_mask": mask}
