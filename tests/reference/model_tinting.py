"""Jung et al. 2024, "Why train everything? Tint a single layer", its coefficients and the choice of labels; float64."""


def model_tinting(base, models, coefficients):
    """One tensor, given a coefficient of each model."""
    merged = base.double().clone()
    for model, c in zip(models, coefficients, strict=True):
        merged += min(max(float(c), 0.0), 1.0) * (model.double() - base.double())
    return merged


def loss(merged, expert):
    """The loss of one token, given the probabilities of both."""
    p, q = merged.tolist(), expert.tolist()
    label = q.index(max(q))
    own = p.index(max(p))
    if own != label and max(q) < max(p):
        return 0.0
    return -merged[label].log()
