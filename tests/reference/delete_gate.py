"""Kallini et al. 2025, "MrT5", section 3: the gate, its softmax and its controller; float64, written as loops."""

import math


def gate(hidden, gain, weight, bias, scale):
    """Values of the tokens of one row."""
    values = []
    for state in hidden:
        rms = math.sqrt(sum(x * x for x in state) / len(state) + 1e-6)
        logit = sum(w * g * x / rms for w, g, x in zip(weight, gain, state, strict=True)) + bias
        values.append(scale / (1 + math.exp(logit)))
    return values


def softmax1(logits):
    """A softmax with one more logit, 0, whose share is left out."""
    mass = [math.exp(each) for each in logits]
    return [each / (1 + sum(mass)) for each in mass]


def controller(target, rates, kp, ki):
    """The coefficient after each rate."""
    p = i = 0.0
    found = []
    for rate in rates:
        p = 0.9 * p + 0.1 * kp * (target - rate)
        i += ki * (target - rate)
        found.append(max(0.0, p + i))
    return found
