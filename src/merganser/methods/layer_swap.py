"""Layer swapping: replace the first and the last layers by those of another model."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from ..errors import ParameterError
from ..method import Fraction, Location, Number, default, merge_method

Layers = Annotated[int, Number(0, search=(0, 8))]
Outside = Literal["mix", "first", "second"]


def share(
    location: Location,
    bottom: int,
    top: int,
    bottom_transition: int,
    top_transition: int,
    t: float,
    embedding: str,
    head: str,
) -> float:
    """Return the share of the second model in a tensor, from 0 to 1."""
    if location.layer is None or location.position != "layer":
        chosen = embedding if location.position == "before" else head
        return {"mix": t, "first": 0.0, "second": 1.0}[chosen]
    needed = bottom + bottom_transition + top_transition + top
    if needed > location.n_layers:
        raise ParameterError(
            f"layer_swap: bottom {bottom}, bottom_transition {bottom_transition}, top_transition {top_transition} and "
            f"top {top} need {needed} layers, there are {location.n_layers}; make one of them smaller"
        )
    below, above = location.layer, location.n_layers - 1 - location.layer
    if below < bottom or above < top:
        return 1.0
    return t if below < bottom + bottom_transition or above < top + top_transition else 0.0


@merge_method(
    family="layers",
    cite="bandarkar2025layer",
    models=(2, 2),
    located={"share": share},
    breaks={"order": "the second model gives the outer layers"},
)
def layer_swap(
    models: list[Tensor],
    share: Tensor,
    *,
    bottom: Layers = 5,
    top: Layers = 2,
    bottom_transition: Layers = 1,
    top_transition: Layers = 1,
    t: Fraction = default(0.5),
    embedding: Outside = "mix",
    head: Outside = "mix",
) -> Tensor:
    """Take the first and the last layers from the second model, and the layers between from the first.

        share  = 1 in the first `bottom` and the last `top` layers, t in the transition layers next to them, else 0
        merged = (1 - share) * first + share * second

    Use when:
        A model was fine-tuned on a task in one language and should do it in another, for which a second fine-tune of
        the same base exists. Name the model of the task first, that of the language second.

    Args:
        bottom: Number of layers at the start that come from the second model.
        top: Number of layers at the end that come from the second model.
        bottom_transition: Number of mixed layers after those at the start.
        top_transition: Number of mixed layers before those at the end.
        t: Share of the second model where both are mixed.
        embedding: Whether tensors before the layers (embeddings, encoders of images and sound) come from the first
            model, from the second, or are mixed. A tied head is its embedding.
        head: The same for tensors after the layers: final norm and head.

    Differs from the paper:
        The defaults are those that the paper is reported to give for 32 layers; it tried 4 to 6 layers at the start, 1
        or 2 at the end and transitions of 1 or 2. Not checked: whether it mixes tensors outside the layers, and whether
        it mixes in equal shares. Layers of encoder and decoder are counted separately.
    """
    first, second = models
    mixed = first + share * (second - first)
    return torch.where(share <= 0, first, torch.where(share >= 1, second, mixed))
