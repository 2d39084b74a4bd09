"""Yu et al. 2024, "Language Models are Super Mario", equation 1: delta_hat = (1 - m) * delta / (1 - p), m ~ Bernoulli(p).

p is 1 - density. Then task arithmetic.
"""

import torch

from tests.reference.draws import draws


def drop_and_rescale(delta, density, model, *, rescale, rescale_to, seed, tensor):
    kept = torch.from_numpy(draws(seed, tensor, model, delta.numel())).view(delta.shape) < density
    survivors = delta * kept
    if rescale and rescale_to == "expectation" and density > 0:
        survivors = survivors / density
    if rescale and rescale_to == "l1":
        before, after = float(delta.abs().sum()), float(survivors.abs().sum())
        survivors = survivors * (before / after if min(before, after) >= 1e-7 else 1)
    return survivors


def dare(base, models, density, rescale, rescale_to, seed, tensor):
    density = density or [1.0] * len(models)
    return [
        drop_and_rescale(model.double() - base, d, i, rescale=rescale, rescale_to=rescale_to, seed=seed, tensor=tensor)
        for i, (model, d) in enumerate(zip(models, density, strict=True))
    ]


def dare_linear(
    base,
    models,
    *,
    weight,
    density=None,
    normalize=False,
    rescale=True,
    rescale_to="expectation",
    seed=0,
    tensor="tensor",
    **other,
):
    base = base.double()
    kept = dare(base, models, density, rescale, rescale_to, seed, tensor)
    total = sum(w * vector for w, vector in zip(weight, kept, strict=True))
    return base + other.get("lambda", 1.0) * total / (sum(weight) if normalize else 1)
