"""Tam et al. 2024, "Merging by Matching Models in Task Parameter Subspaces", section 3: with the Kronecker products written
out, and conjugate gradients as in the textbook; or solved outright."""

import torch


def system(models, grams, gradient_grams, *, weight=None, alpha=1.0):
    """Return A and b of the equations A vec(W) = b."""
    weight = [1.0] * len(models) if weight is None else list(weight)

    def shrink(gram):
        gram = gram.double()
        return alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())

    terms = [
        # vec by rows: vec(H W G) = (H kron G^T) vec(W)
        w * torch.kron(shrink(h), shrink(g).T.contiguous())
        for w, g, h in zip(weight, grams, gradient_grams, strict=True)
    ]
    right = sum(term @ model.double().reshape(-1) for term, model in zip(terms, models, strict=True))
    return sum(terms), right


def mats(base, models, grams, gradient_grams, *, weight=None, alpha=1.0, iterations=10, reference="average", **_):
    matrix, right = system(models, grams, gradient_grams, weight=weight, alpha=alpha)
    shares = [1.0] * len(models) if weight is None else list(weight)
    mean = sum(w * model.double() for w, model in zip(shares, models, strict=True)) / sum(shares)
    x = (mean if reference == "average" else base.double()).reshape(-1)
    r = right - matrix @ x
    p, first = r.clone(), r @ r
    for _ in range(iterations):
        if r @ r <= 1e-10 * first:
            break
        a = (r @ r) / (p @ matrix @ p)
        x = x + a * p
        after = r - a * (matrix @ p)
        p = after + (after @ after) / (r @ r) * p
        r = after
    return x.reshape(base.shape)
