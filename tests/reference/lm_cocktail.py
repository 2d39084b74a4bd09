"""Xiao et al. 2023, "LM-Cocktail", equations 1 to 3.

w_i = softmax(-L(M_i, E_t) / tau); M_r = alpha M_t + (1 - alpha) sum_i w_i M_i. Given weights multiply the softmax.
"""

import math


def lm_cocktail(base, models, *, weight=None, loss=None, temperature=5.0, alpha=0.0):
    weight = weight or [1.0] * len(models)
    loss = loss or [0.0] * len(models)
    terms = [w * math.exp(-x / temperature) for w, x in zip(weight, loss, strict=True)]
    mixed = sum(term / sum(terms) * model.double() for term, model in zip(terms, models, strict=True))
    return alpha * models[0].double() + (1 - alpha) * mixed
