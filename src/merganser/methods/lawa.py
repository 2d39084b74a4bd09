"""LAWA: average of the latest checkpoints."""

from typing import Annotated

from torch import Tensor

from ..method import Number, merge_method

Window = Annotated[int, Number(1, search=(1, 3))]


@merge_method(family="averages", cite="kaddour2022lawa", breaks={"order": "checkpoints are given in the order of time"})
def lawa(models: list[Tensor], *, k: Window = 10) -> Tensor:
    """Average the last k checkpoints, the earliest being named first.

        merged = (model_(n-k+1) + ... + model_n) / k

    Use when:
        The models are checkpoints of one run at a high learning rate, a good many steps apart. The average is about
        what training would reach after its learning rate had come down.

    Args:
        k: How many checkpoints are averaged; all where there are fewer.

    Differs from the paper:
        Nothing: before k checkpoints exist the authors average those that do, too.
    """
    latest = models[-k:]
    total = latest[0]
    for model in latest[1:]:
        total = total + model
    return total / len(latest)
