"""Shoemake 1985, "Animating rotation with quaternion curves": Slerp(q1, q2; u), on a flattened tensor.

With the customary straight line where |cos| > 0.9995, and on vectors that keep their lengths.
"""

import math

import torch


def slerp(base, models, t):
    a, b = base.double(), models[0].double()
    norms = [math.sqrt(sum(v * v for v in x.reshape(-1).tolist())) for x in (a, b)]
    product = sum(u * v for u, v in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True))
    cosine = product / (norms[0] * norms[1]) if norms[0] and norms[1] else 0.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * a + math.sin(t * theta) * b) / torch.tensor(math.sin(theta)).double()
