"""EMA: average of checkpoints, the later ones counting more."""

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
    """Take the exponential moving average of checkpoints, the earliest being named first.

        average_j = beta * average_(j-1) + (1 - beta) * model_j
        merged    = average_n / (1 - beta^n), average_0 = 0          (average_1 = model_1 without bias_correction)

    Use when:
        The models are checkpoints of one run, and training still moves: the latest should count most.

    Args:
        beta: Share that the past keeps at every checkpoint; 0 takes the last one, 1 the mean of all. Checkpoints lie
            many steps apart: 0.2 to 0.5 here does what 0.99 to 0.9999 does at every step.
        bias_correction: Give checkpoint j of n the share beta^(n - j), divided by the sum of these. Without it the
            average starts at the first checkpoint, which then has all the share that is left of the past.

    Differs from the paper:
        The paper averages at every few steps of the training, with beta close to 1, and starts at the first weights.
    """
    age = torch.arange(len(models) - 1, -1, -1, device=beta.device)
    kept = beta**age
    if not bias_correction:
        kept = torch.where(age < len(models) - 1, (1 - beta) * kept, kept)
    return weighted_sum(models, shares(kept))
