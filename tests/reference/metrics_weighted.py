"""Yu and Choi 2025, metrics-weighted averaging, read as a power: one penalty exponent p for all.

w_k = (1 / loss_k)^p / sum_j (1 / loss_j)^p, or w_k = step_k^p / sum_j step_j^p.
"""


def metrics_weighted(base, models, *, metric, by="loss", penalty=1.0):
    power = [(1 / m if by == "loss" else m) ** penalty for m in metric]
    return sum(p / sum(power) * model.double() for p, model in zip(power, models, strict=True))
