"""Li et al. 2022, "Branch-Train-Merge", section 2.2: theta = sum_j p(D = j | x) theta_j, over the top k renormalised."""

import numpy as np


def posterior_of(losses, prior, smoothing):
    """The moving average of p(D = j | x) over sequences, from their log-likelihoods; losses of shape [models, sequences]."""
    likelihoods = np.exp(-np.asarray(losses, dtype=np.longdouble)) * np.asarray(prior, dtype=np.longdouble)[:, None]
    each = (likelihoods / likelihoods.sum(0)).T
    if not smoothing:
        return each.mean(0).astype(float)
    average = each[0]
    for own in each[1:]:
        average = smoothing * own + (1 - smoothing) * average
    return average.astype(float)


def btm(base, models, *, posterior, top_k=0):
    chosen = sorted(range(len(models)), key=lambda j: -posterior[j])[: top_k or len(models)]
    total = sum(posterior[j] for j in chosen)
    return sum(posterior[j] / total * models[j].double() for j in sorted(chosen))
