"""LAWA: average of the latest checkpoints."""

from typing import Annotated

from torch import Tensor

from ..method import Number, merge_method

Window = Annotated[int, Number(1, search=(1, 3))]


@merge_method(family="averages", cite="kaddour2022lawa", breaks={"order": "checkpoints are given in the order of time"})
def lawa(models: list[Tensor], *, k: Window = 10) -> Tensor:
    """Average the last k checkpoints; name the earliest first.

        merged = (model_(n-k+1) + ... + model_n) / k

    Use when:
        The models are checkpoints of one run at a high learning rate, many steps apart. The average is about as good as
        the model that training would reach after decaying its learning rate.

    Args:
        k: Number of checkpoints that are averaged; all if there are fewer.

    Differs from the paper:
        Nothing: as long as fewer than k checkpoints exist, the authors also average those that do.
    """
    latest = models[-k:]
    total = latest[0]
    for model in latest[1:]:
        total = total + model
    return total / len(latest)
