"""RAM: average the changes that several models share, keep those of a single model in full."""

from torch import Tensor

from ..method import NonNegative, default, merge_method
from ..ops import average_changes


@merge_method(
    family="task vectors",
    cite="yuan2026ram",
    breaks={"identical": "changes up to epsilon are dropped"},
)
def ram(base: Tensor, models: list[Tensor], *, epsilon: NonNegative = default(1e-5)) -> Tensor:
    """Average the changes that several models made to an element, and add the change of a single model in full.

        changed_i = 1 where |delta_i| > epsilon, else 0
        merged    = base + sum_i changed_i * delta_i / max(1, sum_i changed_i)

    Use when:
        The models were trained by reinforcement learning, which changes few elements, and different ones in each model.

    Args:
        epsilon: Changes up to this size count as none.

    Differs from the paper:
        Nothing.
    """
    return base + average_changes(base, models, epsilon)
