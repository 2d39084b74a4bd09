"""Morales-Brotons et al. 2024, section 2: theta_EMA_t = beta theta_EMA_(t-1) + (1 - beta) theta_t.

From theta_EMA_0 = 0 with the correction 1 / (1 - beta^n) of Adam, or from theta_EMA_1 = theta_1.
"""


def ema(base, models, *, beta=0.5, bias_correction=True):
    if not bias_correction:
        average = models[0].double()
        for model in models[1:]:
            average = beta * average + (1 - beta) * model.double()
        return average
    if beta == 1:
        # the limit
        return sum(model.double() for model in models) / len(models)
    average = 0 * models[0].double()
    for model in models:
        average = beta * average + (1 - beta) * model.double()
    return average / (1 - beta ** len(models))
