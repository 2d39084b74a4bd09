"""AIM: move a merge back towards the base where the base is most active."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method import Embeddings, Fraction, FromData, Others, default, merge_method
from ..ops import deltas


@merge_method(
    family="data",
    cite="nobari2025aim",
    scope="matrix",
    models=(1, 1),
    statistics={"magnitude": FromData("magnitude", of="base")},
    breaks={"identical": "part of what the model learnt is undone"},
)
def aim(
    base: Tensor,
    models: list[Tensor],
    magnitude: Sequence[Tensor] | None,
    *,
    omega: Fraction = default(0.4),
    quantile: Fraction = default(1.0),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Undo part of a merge's changes, more of them in columns where the base's inputs are larger: a last step of any merge.

        a      = mean of |x| over the tokens that the base was measured on, for each column
        merged = base + (model - base) (1 - (1 - omega) min(a / quantile of a, 1)), column by column

    The model is a merge: the result of an earlier document of the same recipe, or a checkpoint.

    Use when:
        Another method's merge has lost what the base could do. The statistics are of the base, on general text, so you can
        use them for every merge of models of this base.

    Args:
        omega: What remains of the change in the most active column; with 1 the merge stays as it is.
        quantile: The quantile of the columns' activity from which a column counts as fully active; 1 is the most active
            column alone. Where few columns are far more active than all others, only these are protected then, and a
            quantile such as 0.99 protects more.

    Differs from the paper:
        The paper also treats the weights of norms and the head by their inputs; here `others` applies to norms, and the
        head stays as merged. The quantile is ours; 1 is the paper's maximum.
        Matrices without statistics (embeddings, the head) stay as merged.
    """
    (delta,) = deltas(base, models)
    if magnitude is None:
        return base + delta
    activity = magnitude[0].double()
    largest = torch.quantile(activity, quantile.double())
    share = torch.where(largest > 0, activity / largest, 0.0).clamp(max=1.0)
    return base + delta * (1 - (1 - omega.double()) * share).to(delta.dtype)
