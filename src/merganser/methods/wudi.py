"""WUDI: make the merge act like each task vector on the inputs of its task."""

from torch import Tensor

from ..method import Count, Embeddings, NonNegative, Others, Positive, Scale, default, merge_method
from ..ops.linalg.interference import Interference, Solver, Start, inverse_squares, starting_point
from ..ops.linalg.rounding import deltas_above_rounding


@merge_method(
    family="spectral",
    cite="cheng2025wudi",
    scope="matrix",
    version=3,
    breaks={"identical": "the filter stops on the way from the sum of the models' task vectors"},
)
def wudi(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    lambda_: Scale = default(1.0),
    solver: Solver = "filter",
    time: NonNegative = default(300.0),
    steps: Count = 300,
    learning_rate: Positive = default(1e-5),
    start: Start = "sum",
    others: Others = "base",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Move the sum of the task vectors towards the matrix that interferes least with any of them.

        L(M)   = sum_i |(M - delta_i) delta_i^T|^2 / |delta_i|^2,    delta_i = model_i - base
        C      = sum_i delta_i^T delta_i / |delta_i|^2 = V diag(c) V^T
        M      = M_0 + (M_min - M_0) V diag(1 - exp(-c * time)) V^T,    M_0 = sum_i delta_i
        merged = base + lambda * M

    The rows of a task vector lie approximately in the span of its task's inputs, so the merge should act there as it
    does.

    Use when:
        Experts of clearly different skills were trained from one base, and no data is available. Merges of
        heterogeneous or overlapping checkpoints are safer with task arithmetic.

    Args:
        lambda_: Factor of the merged task vector.
        solver: How M is computed: by the filter above; as the minimum of L itself (the nearest to M_0 if there are
            several); or by Adam from M_0, as in the paper.
        time: How far the filter goes: 0 stays at M_0, large values reach the minimum. For `solver: filter`.
        steps: Steps of Adam. For `solver: adam`.
        learning_rate: Learning rate of Adam, about the distance that every element moves in a step. For `solver: adam`.
        start: M_0: the sum of the task vectors, their mean, or zero.

    Differs from the paper:
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        The paper takes 300 steps of Adam, which stop long before the minimum; `solver: adam` repeats them. The filter
        does the same without a step size, and comes from later code of its group (there called IWUDI), which reports
        better results for it than for Adam, and for Adam than for the minimum.
        The authors leave all that is not in attention or MLP as it is in the base, and so does the default here;
        FusionBench averages it.
        Directions in which c is below 1e-8 are not changed, because c is only rounding error there.
        Matrices are used as they are stored, assuming [outputs, inputs]. GPT-2 and some packed experts are stored
        transposed, so that there the method treats columns as it should treat rows.
        A model equal to the base is left out instead of giving NaN.
    """
    vectors = deltas_above_rounding(base, models, rounding)
    interference = Interference(vectors, vectors, inverse_squares(vectors), starting_point(vectors, start))
    merged = interference.solved(solver, time, steps, learning_rate)
    return base + lambda_ * merged.to(base.dtype)
