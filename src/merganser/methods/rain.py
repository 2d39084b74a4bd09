"""RAIN merging, first stage: add what tuning for instructions changed, but not where a reasoning model marks its thoughts."""

from collections.abc import Sequence

from torch import Tensor

from ..method import Embeddings, FromData, Others, Positive, Scale, default, merge_method
from ..ops import deltas, solve_right


@merge_method(
    family="data",
    cite="huang2026rain",
    scope="matrix",
    models=(2, 2),
    statistics={"gram": FromData("gram", of="first")},
    breaks={"identical": "both task vectors are added up", "order": "the first model is the one to preserve"},
)
def rain(
    base: Tensor,
    models: list[Tensor],
    gram: Sequence[Tensor] | None,
    *,
    lambda_: Scale = default(1.0),
    ridge: Positive = default(1e-4),
    others: Others = "sum",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Add the second model's task vector to the first model, without the part that acts on the inputs of chosen tokens.

        G      = mean of x x^T over the tokens that count, in the first model
        merged = model_1 + lambda (model_2 - base) e (G + e I)^-1,    e = ridge times the mean of the diagonal of G

    e (G + e I)^-1 leaves the directions that no chosen token takes, and takes away those that they take: outputs for the
    chosen tokens stay those of the first model.

    Use when:
        A reasoning model (the first) should follow instructions better, as a tuned sibling (the second) does, and keep the
        format of its thoughts. Calibrate it on its own answers, given as prompt and completion, with the marks of thinking
        (such as `</think>` and what stands next to it) as the completion and `--tokens completions`. A hundred texts are
        enough; many more would leave nothing to add.

    Args:
        lambda_: Factor of what is added.
        ridge: How strongly weak directions of the chosen tokens are protected: smaller is stricter.

    Differs from the paper:
        Only the first stage; in the second, the paper fits a factor for each head and MLP to where the model attends, and
        its fallback is 1. Here one lambda replaces all of them.
        The authors' code takes one number per token and head from queries, keys and outputs, and projects on what leaves
        these numbers; here all inputs of a chosen token are protected, which is stricter, and needs only the Gram matrix.
        Its ridge of 1e-4 is absolute; here it is relative to the inputs.
        Matrices without statistics are the base with both task vectors, the second times lambda.
    """
    first, second = (delta.double() for delta in deltas(base, models))
    if gram is not None:
        inputs = gram[0].double()
        step = ridge.double() * inputs.diagonal().mean()
        # without inputs there is nothing to protect
        if step > 0:
            second = solve_right(second * step, inputs, ridge)
    return base + (first + lambda_ * second).to(base.dtype)
