"""A method that takes statistics of the base on the data of every model, and none of the models; no built-in method does."""

from collections.abc import Sequence

from torch import Tensor

from merganser.method import FromData, merge_method


@merge_method(family="data", cite="-", statistics={"gradient": FromData("gradient", of="base_on_models")})
def downhill(base: Tensor, models: list[Tensor], gradient: Sequence[Tensor] | None) -> Tensor:
    """Keep of every task vector what points down the gradient of the base's loss on that model's data.

        merged = base + sum_i [(model_i - base) gradient_i < 0] (model_i - base)

    Use when:
        A test wants such a method.
    """
    merged = base.clone()
    for i, model in enumerate(models):
        delta = model - base
        if gradient is not None:
            delta = delta * (delta * gradient[i] < 0)
        merged = merged + delta
    return merged
