"""Zhou et al. 2024, "MetaGPT", equation 13: lambda_t = |theta_t - theta_0|^2 / sum_k |theta_k - theta_0|^2."""


def factors(tensors):
    """One factor per model, from (base, models) of one tensor or of all tensors of a model."""
    n = len(tensors[0][1])
    squares = [
        sum(float((models[t].double() - base.double()).norm()) ** 2 for base, models in tensors) for t in range(n)
    ]
    return [square / sum(squares) if sum(squares) else 1 / n for square in squares]


def add(base, models, factor):
    base = base.double()
    return base + sum(f * (model.double() - base) for f, model in zip(factor, models, strict=True))


def metagpt(base, models, **other):
    return add(base, models, factors([(base, models)]))
