"""PCB: weigh the elements of task vectors by their balance of competition."""

from typing import Annotated, Literal

import torch
from torch import Tensor

from ..method import Fraction, Number, PerModel, Scale, Weight, default, merge_method, statistic
from ..ops import at_least, order_statistic

Clip = Annotated[Tensor, Number(0.0, 0.5, search=(0.0, 0.05))]
# relative resolution of a wide order statistic (2^-36), with a margin for rounding
_STEP = 2.0**-35


def changes(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """Return the task vectors, float64, so that rounding does not decide ranks."""
    return [model.double() - base.double() for model in models]


def halves(values: list[Tensor]) -> list[Tensor]:
    """Return the positive parts of all values, then their negative parts as positive numbers."""
    return [value.clamp(min=0) for value in values] + [(-value).clamp(min=0) for value in values]


def joined(plus: Tensor, minus: Tensor) -> Tensor:
    """Return the order statistic of signed values from those of their positive and negative parts."""
    return torch.where(plus > 0, plus, -minus)


def normalized(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map the interval [low, high] linearly to [0, 1]; everything to 0 if it has no length."""
    known = high > low
    return torch.where(known, (value - low) / torch.where(known, high - low, 1.0), 0.0)


# The paper's form


def of_paper(form: str) -> bool:
    """Return whether the form is that of the paper."""
    return form == "paper"


def products(vectors: list[Tensor]) -> dict[tuple[int, int], Tensor]:
    """Return the products of task vectors i and j for all i <= j."""
    n = len(vectors)
    return {(i, j): vectors[i] * vectors[j] for i in range(n) for j in range(i, n)}


def ends(base: Tensor, models: list[Tensor]) -> Tensor:
    """Measure the maximum of each product and of its negative, shape [T (T + 1) / 2, 2]."""
    products_of_changes = products(changes(base, models)).values()
    return torch.stack([torch.stack([value.max(), (-value).max()]) for value in products_of_changes])


def as_bits(measured: Tensor) -> Tensor:
    """Return the bits as int64, because the engine would round floats to the dtype of the blocks."""
    return measured.view(torch.int64)


def affinities(vectors: list[Tensor], extent: Tensor) -> dict[tuple[int, int], Tensor]:
    """Return exp(Norm(delta_i * delta_j)) for all i <= j."""
    products_of_vectors = products(vectors)
    return {
        pair: torch.exp(normalized(value, -bounds[1], bounds[0]))
        for (pair, value), bounds in zip(products_of_vectors.items(), extent.view(torch.float64), strict=True)
    }


def exponentials(base: Tensor, models: list[Tensor], extent: Tensor) -> Tensor:
    """Measure the denominators of the softmax: for each model intra, then inter with every model, shape [T, T + 1]."""
    n = len(models)
    affinity = affinities(changes(base, models), extent)
    inter = {pair: value.sum() for pair, value in affinity.items()}
    rows = [
        (affinity[i, i] ** n).sum() if j < 0 else inter[min(i, j), max(i, j)] for i in range(n) for j in range(-1, n)
    ]
    return torch.stack(rows).view(n, n + 1)


def means(measured: Tensor, size: Tensor) -> Tensor:
    """Return the means from sums over `size` elements."""
    return measured / size


def paper_balance(vectors: list[Tensor], extent: Tensor, mean: Tensor) -> list[Tensor]:
    """Return intra * inter for every model; softmax divides by the mean instead of the sum, to avoid tiny values."""
    n = len(vectors)
    affinity = affinities(vectors, extent)
    balance = []
    for i in range(n):
        inter = torch.zeros_like(vectors[i])
        for j in range(n):
            inter = inter + affinity[min(i, j), max(i, j)] / mean[i, j + 1]
        balance.append(affinity[i, i] ** n / mean[i, 0] * inter)
    return balance


# The form of the authors' code


def of_code(form: str) -> bool:
    """Return whether the form is that of the authors' code."""
    return form == "code"


def magnitudes(base: Tensor, models: list[Tensor]) -> list[Tensor]:
    """Return the magnitudes of the task vectors, float64."""
    return [vector.abs() for vector in changes(base, models)]


def clip_ranks(positive: Tensor, size: Tensor, clip: Tensor) -> Tensor:
    """Return the ranks of the largest and the smallest magnitude that are not clipped, shape [T, 2]."""
    low = (size * clip).floor()
    high = (size * (1 - clip) - 1).floor().clamp(min=0)
    return torch.stack([size - high, size - low]).to(torch.int64).expand(len(positive), 2)


def clipped(vector: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the magnitudes of a task vector, clipped to its bounds; and the same, normalized to [0, 1]."""
    found = bounds.view(torch.float64)
    size = vector.abs().clamp(found[1], found[0])
    return size, normalized(size, found[1], found[0])


def code_balance(vectors: list[Tensor], bounds: Tensor) -> list[Tensor]:
    """Return intra * inter for every model, which may be negative."""
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    balance = []
    for i, vector in enumerate(vectors):
        share = clipped(vector, bounds[i])[1]
        balance.append(torch.exp(len(vectors) * share * share) * torch.tanh(vector * total))
    return balance


# Both


def balances(
    base: Tensor, models: list[Tensor], extent: Tensor | None, mean: Tensor | None, bounds: Tensor | None
) -> list[Tensor]:
    """Return the non-negative values by which elements are ranked; for the code's form, positive and negative parts."""
    vectors = changes(base, models)
    if bounds is not None:
        return halves(code_balance(vectors, bounds))
    assert extent is not None
    assert mean is not None
    return paper_balance(vectors, extent, mean)


def cut_ranks(density: Tensor, size: Tensor, form: str) -> Tensor:
    """Return the rank of the last kept element, shape [T, 1]; for the code's form of last and first, [2T, 2]."""
    if form == "paper":
        kept = torch.where(density > 0, (density * size).floor().clamp(min=1), 0.0)
        return kept.to(torch.int64).unsqueeze(1)
    kept = torch.where(density > 0, size - (size * (1 - density)).floor().clamp(max=size - 1), 0.0)
    first = torch.ones_like(kept)
    plus, minus = torch.stack([kept, first], dim=1), torch.stack([size - kept + 1, first * size], dim=1)
    return torch.cat([plus, minus]).to(torch.int64)


def hard(balance: list[Tensor], cut: Tensor) -> list[Tensor]:
    """Return the balance where it is at least the cut, 0 elsewhere."""
    return [torch.where(at_least(value, cut[i, 0]), value, 0.0) for i, value in enumerate(balance)]


def soft(balance: list[Tensor], cut: Tensor) -> list[Tensor]:
    """Map the balance linearly from 0 at the cut (and below) to 1 at the largest; to 0 or 1 if these are equal."""
    found, share = cut.view(torch.float64), []
    for i, value in enumerate(balance):
        plus, minus = found[i], found[i + len(balance)]
        last, first = joined(plus[0], minus[0]), joined(plus[1], minus[1])
        step = last.abs() * _STEP
        apart = first > last
        rising = torch.where(value > last + step, (value - last) / torch.where(apart, first - last, 1.0), 0.0)
        share.append(torch.where(apart, rising, (value >= last - step).double()))
    return share


@merge_method(
    family="task vectors",
    cite="du2024pcb",
    statistics={
        "extent": statistic(ends, as_bits, over="balance_over", when=of_paper, largest=True),
        "mean": statistic(exponentials, means, over="balance_over", when=of_paper),
        "bounds": order_statistic(magnitudes, clip_ranks, over="balance_over", when=of_code, wide=True),
        "cut": order_statistic(balances, cut_ranks, over="balance_over", wide=True),
    },
    version=2,
    breaks={"identical": "elements of low balance are dropped"},
)
def pcb(
    base: Tensor,
    models: list[Tensor],
    extent: Tensor | None,
    mean: Tensor | None,
    bounds: Tensor | None,
    cut: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    density: PerModel[Fraction] = default(0.1),
    form: Literal["paper", "code"] = "paper",
    clip: Clip = default(0.0001),
    balance_over: Literal["model", "tensor"] = "model",
) -> Tensor:
    """Weigh every element of a task vector by its size among its own, and by its agreement with the other task vectors.

        intra_i   = softmax(T * Norm(delta_i^2))     (over the elements; Norm maps the smallest to 0, the largest to 1)
        inter_i   = sum_j softmax(Norm(delta_i * delta_j))
        balance_i = intra_i * inter_i where that is among the k_i largest, else 0, k_i = floor(density_i * size)
        merged    = base + lambda * sum_i balance_i * weight_i * delta_i / sum_i balance_i

    The form of the authors' code, with |delta_i| limited to its quantiles of `clip` and 1 - `clip`:

        balance_i = exp(T * Norm(|delta_i|)^2) * tanh(delta_i * sum_j delta_j)
        share_i   = how far balance_i is from its k_i-th largest value (0) to its largest (1), at least 0
        merged    = base + lambda * sum_i share_i * weight_i * delta_i / max(sum_i share_i, 1e-12)

    Use when:
        Three or more fine-tunes on clearly different tasks are merged. Try lambda 0.8 to 1.3.

    Args:
        weight: Factor of each task vector; the authors search from 0.8 to 1.3.
        lambda_: Factor of the merged task vector.
        density: Share of each task vector that is kept, r in the paper.
        form: The formulas of the paper, or those of the authors' code. They differ: the code's inter-balancing
            multiplies unscaled task vectors, whose products are tiny, and gives elements just above the cut almost no
            weight.
        clip: Share of elements at either end whose magnitude the code's form limits; for vision models it takes 0.01.
        balance_over: Normalize and rank over the whole model as published, or inside each tensor.

    Differs from the paper:
        The default of the density is that of the authors' code. Not checked: the paper's own defaults, and whether its
        Norm is that of the code.
        Balances are compared to 2^-36 of their value; equal ones are all kept.
        If all kept elements have equal balance, the code divides 0 by 0; here they count equally.
    """
    vectors = changes(base, models)
    if bounds is None:
        share = hard(balances(base, models, extent, mean, bounds), cut)
    else:
        share = soft(code_balance(vectors, bounds), cut)
        vectors = [clipped(vector, bounds[i])[0] * vector.sign() for i, vector in enumerate(vectors)]
    total = parts = torch.zeros_like(vectors[0])
    for i, vector in enumerate(vectors):
        total = total + share[i] * weight[i] * vector
        parts = parts + share[i]
    below = torch.where(parts > 0, parts, 1.0) if bounds is None else parts.clamp(min=1e-12)
    return base + lambda_ * (total / below).to(base.dtype)
