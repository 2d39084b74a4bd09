"""RAM: average what several reinforced models changed, keep what only one did."""

from torch import Tensor

from ..method import NonNegative, default, merge_method
from ..ops import average_changes


@merge_method(
    family="task vectors",
    cite="yuan2026ram",
    breaks={"identical": "changes up to epsilon are dropped"},
)
def ram(base: Tensor, models: list[Tensor], *, epsilon: NonNegative = default(1e-5)) -> Tensor:
    """Average the changes that models share, and add those that only one made in full.

        changed_i = 1 where |delta_i| > epsilon, else 0
        merged    = base + sum_i changed_i * delta_i / max(1, sum_i changed_i)

    Use when:
        The models were trained by reinforcement learning, whose changes are sparse and lie in different places.

    Args:
        epsilon: Changes up to this size count as none.

    Differs from the paper:
        Nothing.
    """
    return base + average_changes(base, models, epsilon)
