"""Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 2: theta_new = theta + lambda sum_t tau_t.

With a weight for each task vector.
"""


def task_arithmetic(base, models, *, weight, normalize=False, **other):
    base = base.double()
    total = sum(w * (model.double() - base) for w, model in zip(weight, models, strict=True))
    if normalize:
        total = total / (sum(weight) if abs(sum(weight)) > 1e-8 else 1)
    return base + other.get("lambda", 1.0) * total
