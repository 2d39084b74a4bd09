"""LiNeS: add the average of the task vectors, the more of it the deeper the layer."""

from torch import Tensor

from ..method import Location, PerModel, Scale, Weight, default, merge_method
from ..ops import check_total, deltas, weighted_sum


def factor(location: Location, alpha: float, beta: float) -> float:
    """Return the factor of the task vectors in a tensor: alpha in the first layer, alpha + beta in the last."""
    if location.layer is None or location.position != "layer":
        return alpha
    return alpha + beta * location.layer / max(location.n_layers - 1, 1)


@merge_method(
    family="layers",
    cite="wang2025lines",
    validate=check_total,
    located={"factor": factor},
    breaks={"identical": "deeper layers get more than the average"},
)
def lines(
    base: Tensor,
    models: list[Tensor],
    factor: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    alpha: Scale = default(1.0),
    beta: Scale = default(1.0),
) -> Tensor:
    """Add the average of the task vectors with a factor that grows linearly with the depth of the layer.

        factor = alpha + beta * layer / (number of layers - 1) in layers, counted from 0; alpha outside them
        merged = base + factor * sum_i weight_i * (model_i - base) / sum_i weight_i

    Use when:
        Task vectors should be added beyond their average without disturbing the first layers, where what the base can
        do in general is lost first. Or a single fine-tune forgot much: alpha 0, beta 1 keeps its last layer in full and
        the first layer of the base.

    Args:
        weight: Share of each task vector in the average.
        alpha: Factor in the first layer, and of what is in no layer: embeddings, final norm, head.
        beta: What the factor of the last layer has more than that of the first.

    Differs from the paper:
        The paper scales what any method merged; this is its form for task arithmetic, of T models with weight 1. Its
        factors are those of the sum of the task vectors, so its alpha, 1 / T, is 1 here, and its beta, which the
        authors' program searches from 0 to 1, is beta / T here. The default of beta is not theirs.
        For a single model their program searches alpha from 0 to 1 with beta = 1 - alpha.
        Identical models are returned only where the factor is 1.
        Layers of encoder and decoder are counted separately; layers of encoders of images and sound beside the model
        count as outside of layers. The authors' program goes by numbers in names, and was read only for vision models.
    """
    return base + factor * (weighted_sum(deltas(base, models), weight) / weight.sum())
