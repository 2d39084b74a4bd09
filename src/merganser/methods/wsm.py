"""WSM: average of checkpoints in place of a decay of the learning rate."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..method import merge_method
from ..ops import weighted_sum

Decay = Literal["1-sqrt", "linear", "cosine"]


def rate(done: float, decay: str) -> float:
    """Return the learning rate of a decay, over that before it.

    Args:
        done: Share of the decay that is over, from 0 to 1.
        decay: Its form.
    """
    if decay == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if decay == "cosine" else 1 - math.sqrt(done)


@merge_method(family="averages", cite="tian2025wsm", breaks={"order": "checkpoints are given in the order of time"})
def wsm(models: list[Tensor], *, decay: Decay = "1-sqrt") -> Tensor:
    """Average checkpoints of a constant learning rate as if it had decayed between them; name the earliest first.

        w_j    = decay(j / n), j = 0 ... n, n = the number of checkpoints: w_0 = 1, w_n = 0
                 1 - sqrt(x) | 1 - x | (1 + cos(pi x)) / 2
        merged = model_1 + sum_(j = 1)^(n - 1) w_j * (model_(j+1) - model_j)
               = sum_(j = 1)^n (w_(j-1) - w_j) * model_j

    Use when:
        The models are checkpoints of one run whose learning rate was never decayed, at equal distances. The paper finds
        that how much of the training they span matters more than how many they are.

    Args:
        decay: Form of the learning rate from the first checkpoint on. `linear` is the mean of all; `1-sqrt` falls
            fastest at first, so that the first checkpoints count most; with `cosine` those in the middle do.

    Differs from the paper:
        Nothing in how weights of checkpoints follow from those of updates. Not checked, because no program of the
        authors is public: at which points of its curve they take the decay (here such that `linear` is the mean), which
        of the forms they found best, and their form of an inverse square root, which is not offered.
        Updates are taken as the training made them; a real decay would have changed the gradients, too.
    """
    n = len(models)
    rates = torch.tensor([rate(j / n, decay) for j in range(n + 1)], dtype=torch.float64, device=models[0].device)
    return weighted_sum(models, rates[:-1] - rates[1:])
