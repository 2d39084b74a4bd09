"""Passthrough: a copy of one model."""

from torch import Tensor

from ..method import PerModel, Scale, default, merge_method


@merge_method(
    family="layers",
    cite="-",
    models=(1, 1),
    breaks={"differs": "it is a copy"},
)
def passthrough(models: list[Tensor], *, scale: PerModel[Scale] = default(1.0)) -> Tensor:
    """Copy the tensors of one model, such as to stack layers of several models into a deeper one.

        merged = scale * model

    Use when:
        Layers should be repeated, removed or taken from different models, each slice from one of them.
        A scale of 0 on `o_proj` and `down_proj` makes a repeated layer pass its input on unchanged.

    Args:
        scale: Factor of the tensor; 1 copies it exactly.

    Differs from the paper:
        There is no paper; the method and its name come from mergekit.
    """
    return models[0] * scale[0]
