"""Li et al. 2022, "Branch-Train-Merge", section 2.2: theta = sum_j p(D = j | x) theta_j, over the top k renormalised."""


def btm(base, models, *, posterior, top_k=0):
    chosen = sorted(range(len(models)), key=lambda j: -posterior[j])[: top_k or len(models)]
    total = sum(posterior[j] for j in chosen)
    return sum(posterior[j] / total * models[j].double() for j in sorted(chosen))
