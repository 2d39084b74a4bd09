"""Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression", equations 3 to 5.

tau_MTL = sum_t tau_t; m_t = 1{|tau_t| >= lambda_t |tau_MTL - tau_t|}, strictly greater in the authors' code;
theta_t = theta_0 + m_t * tau_MTL.
"""


def tall_masks(base, models, **other):
    base = base.double()
    return base + other.get("lambda", 1.0) * sum(model.double() - base for model in models)


def tall_masks_restored(base, models, merged, *, mask_lambda=0.4, **other):
    total = (merged - base) / other.get("lambda", 1.0)
    thresholds = mask_lambda if isinstance(mask_lambda, list) else [mask_lambda] * len(models)
    found = []
    for model, threshold in zip(models, thresholds, strict=True):
        own = model - base
        mask = (own.abs() > threshold * (total - own).abs()).double()
        found.append(base + mask * total)
    return found
