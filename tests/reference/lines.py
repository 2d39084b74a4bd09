"""Wang et al. 2025, "LiNeS", section 4: lambda^(l) = alpha + beta (l - 1) / (L - 1), l = 1 ... L; alpha elsewhere.

With alpha and beta in units of the average of the task vectors.
"""


def lines(base, models, layer, n_layers, *, weight=1.0, alpha=1.0, beta=1.0):
    """One tensor of layer `layer`, from 1 (None: outside of layers), float64."""
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    base = base.double()
    vector = sum(w * (model.double() - base) for w, model in zip(weight, models, strict=True)) / sum(weight)
    if layer is None or n_layers == 1:
        return base + alpha * vector
    return base + (alpha + beta * (layer - 1) / (n_layers - 1)) * vector
