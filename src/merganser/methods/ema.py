"""EMA: average of checkpoints in which later ones count more."""

import torch
from torch import Tensor

from ..method import Fraction, default, merge_method
from ..ops import shares, weighted_sum


@merge_method(
    family="averages",
    cite="moralesbrotons2024ema",
    breaks={"order": "checkpoints are given in the order of time"},
)
def ema(models: list[Tensor], *, beta: Fraction = default(0.5), bias_correction: bool = True) -> Tensor:
    """Take the exponential moving average of checkpoints; name the earliest first.

        average_j = beta * average_(j-1) + (1 - beta) * model_j
        merged    = average_n / (1 - beta^n), average_0 = 0          (average_1 = model_1 without bias_correction)

    Use when:
        The models are checkpoints of one run that is still improving, so that the latest should count most.

    Args:
        beta: Share that the average so far keeps at every checkpoint; 0 takes the last checkpoint, 1 the mean of all.
            Checkpoints are many steps apart: 0.2 to 0.5 here does what 0.99 to 0.9999 does at every step.
        bias_correction: Give checkpoint j of n the share beta^(n - j), divided by the sum of these. Without it the
            average starts at the first checkpoint, which gets the rest of the shares, beta^(n - 1).

    Differs from the paper:
        The paper averages every few steps of the training, with beta close to 1, and starts at the initial weights.
    """
    age = torch.arange(len(models) - 1, -1, -1, device=beta.device)
    kept = beta**age
    if not bias_correction:
        kept = torch.where(age < len(models) - 1, (1 - beta) * kept, kept)
    return weighted_sum(models, shares(kept))
