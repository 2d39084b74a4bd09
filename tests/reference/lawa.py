"""Kaddour 2022, "Stop Wasting My Time!", equation 1: theta_LAWA = 1/k sum_(i = E - k + 1)^E theta_i."""

from collections import deque


def lawa(base, models, *, k=10):
    window = deque(maxlen=k)
    for model in models:
        window.append(model.double())
    return sum(window) / len(window)
