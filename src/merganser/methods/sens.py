"""Sens-Merging: task arithmetic, each layer of each model weighted by how sensitive its loss is to it."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..method import Location, NonNegative, NumbersFromData, PerModel, Positive, Scale, default, merge_method
from ..ops import deltas, weighted_sum


def coefficients(
    location: Location,
    sensitivity: Sequence[Mapping[int | None, float]] | None,
    transfer: Sequence[float],
    temperature: float,
) -> tuple[float, ...]:
    """Return the share of each model in the layer of a tensor.

    Args:
        location: Where the tensor is.
        sensitivity: Of each model, by layer; without them all layers are alike.
        transfer: How well the knowledge of each model carries over to the others.
        temperature: The smaller it is, the more the largest share gets.
    """
    whole = sum(transfer)
    scores = []
    for k, carries in enumerate(transfer):
        table = {} if sensitivity is None else sensitivity[k]
        norm = math.sqrt(sum(value * value for value in table.values()))
        own = table.get(location.layer, 0.0) / norm if norm else 1.0
        scores.append(own * (carries / whole if whole else 1 / len(transfer)) / temperature)
    largest = max(scores)
    powers = [math.exp(score - largest) for score in scores]
    return tuple(power / sum(powers) for power in powers)


@merge_method(
    family="data",
    cite="liu2025sens",
    statistics={"sensitivity": NumbersFromData("sensitivity")},
    located={"share": coefficients},
    breaks={"identical": "the task vectors are added up"},
)
def sens(
    base: Tensor,
    models: list[Tensor],
    share: Tensor,
    *,
    transfer: PerModel[NonNegative] = default(1.0),
    temperature: Positive = default(1.0),
    lambda_: Scale = default(1.0),
) -> Tensor:
    """Add the task vectors, each layer of each model weighted by how sensitive its loss is to it.

        s_il    = sum over the entries w of layer l of model i of |w g|, mean over its text; g: gradient of the loss
        a_il    = s_il / sqrt(sum_l s_il^2),    t_i = transfer_i / sum_j transfer_j
        share_i = exp(a_il t_i / temperature), divided by the sum of these over the models
        merged  = base + lambda T sum_i share_i (model_i - base),    T: number of models

    Use when:
        Task arithmetic works well, and each layer should have its own weights. Statistics are one number per tensor:
        `merganser calibrate EXPERT --data FILE --statistics sensitivity --out FOLDER`.
        As the factors add up to the number of models, the result is close to the plain sum of the task vectors, which is too
        long where several experts learnt different things: give `lambda` the value that suits task arithmetic, such as 0.3.

    Args:
        transfer: How well the knowledge of each model carries over to the others.
        temperature: With 1, shares are nearly equal, since a and t are small: the result is task arithmetic with a weight
            of 1. Smaller values let the layers differ.
        lambda_: Factor of the sum.

    Differs from the paper:
        The authors' code was not found. A third party's takes for `transfer` the mean distance between the logits of
        model i and those of every other, on the text of that one; this needs two models at once, and in the paper it is
        their agreement that counts. Here the numbers are parameters, equal by default.
        Gradients are of whole sequences, one at a time; all that is in no layer counts as one layer; `lambda` is ours.
    """
    return base + lambda_ * len(models) * weighted_sum(deltas(base, models), share)
