"""Si et al. 2025, "NAN": theta = theta_0 + lambda sum_t c_t tau_t, c_t in proportion to 1 / |tau_t|, sum_t c_t = 1."""


def factors(tensors):
    """One factor per model, from (base, models) of one tensor or of all tensors of a model."""
    n = len(tensors[0][1])
    norms = [
        sum(float((models[t].double() - base.double()).norm()) ** 2 for base, models in tensors) ** 0.5
        for t in range(n)
    ]
    inverse = [1 / norm if norm else 0.0 for norm in norms]
    return [one / sum(inverse) if any(inverse) else 0.0 for one in inverse]


def add(base, models, factor, lambda_=1.0):
    base = base.double()
    return base + lambda_ * sum(c * (model.double() - base) for c, model in zip(factor, models, strict=True))


def nan_merging(base, models, **given):
    return add(base, models, factors([(base, models)]), given.get("lambda", 1.0))
