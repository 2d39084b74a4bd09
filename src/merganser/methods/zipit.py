"""ZipIt: hidden units that compute similar values are merged, across models and within each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method import Fraction, FromData, default, merge_method


@merge_method(
    family="data",
    cite="stoica2024zipit",
    scope="tensor",
    statistics={"groups": FromData("groups", inputs="zipped")},
    breaks={"identical": "two units of one model that compute alike may become one"},
)
def zipit(
    models: list[Tensor],
    groups: Sequence[Tensor] | None,
    *,
    alpha: Fraction = default(0.3),
    beta: Fraction = default(0.125),
) -> Tensor:
    """Merge the hidden units of MLPs in groups: outputs of a group are averaged, what reads them adds up; the rest is averaged.

        merged = M blockdiag(model_1, ..., model_K) U
        U      = 1 where an input of a model belongs to a group, else 0
        M      = 1 / (size of the group) where an output of a model belongs to a group, else 0

    The groups of the n hidden units of an MLP: of all K n units of the K models, the two with the highest correlation of
    what they compute become one, again and again, until n are left. One that was made of two has with any other the
    smaller of their correlations, times alpha. Of all steps that could be taken for a model, n (K - 1) / K, at most a
    share of beta joins two units of that model, while others can be joined. Any other input or output is in one group with
    its namesakes.

    All models read the same tokens.

    Use when:
        No permutation matches the models' units one to one: they were trained on other tasks, or from other
        initialisations. In the second case heads and channels need `align` (units: [heads, residual]) first. Units of
        fine-tunes of one base match nearly one to one, and the result is close to the average.

    Args:
        alpha: Factor of the correlations of a unit that was made of two: small values spread units over more groups.
        beta: Share of the steps that may join units of the same model.

    Differs from the paper:
        The paper also zips the channels between layers, and can stop before the last layers, which every model then keeps
        for itself. Here hidden units of MLPs are zipped through the whole depth: heads cannot be zipped channel by
        channel, as each has an attention of its own, and a model that splits has no standard architecture. Heads and
        channels are averaged, after `align` if the recipe has it.
        With a share of 0 no two units of a model are joined; in the authors' code one pair may be.
    """
    total = torch.zeros_like(models[0])
    sizes = [torch.zeros(length, dtype=total.dtype, device=total.device) for length in total.shape]
    outputs = [True] * total.dim()
    for k, model in enumerate(models):
        value, start = model, 0
        own = None if groups is None else groups[k].long()
        for axis, length in enumerate(model.shape):
            index = torch.arange(length, device=model.device)
            if own is not None and length:
                index = own[start : start + length]
                # inputs are numbered from -1 downwards
                outputs[axis] = bool(index[0] >= 0)
                index = torch.where(index < 0, -1 - index, index)
                value = torch.zeros_like(value).index_add_(axis, index, value)
            elif axis:
                outputs[axis] = False
            sizes[axis].index_add_(0, index, torch.ones_like(sizes[axis]))
            start += length
        total += value
    if not any(outputs):
        return total / len(models)
    for axis, size in enumerate(sizes):
        if outputs[axis]:
            shape = [-1 if other == axis else 1 for other in range(total.dim())]
            total = total / size.clamp(min=1).view(shape)
    return total
