"""A control variate: the mean of what was seen, corrected by how the same items differ from all of them for models that saw all.

    estimate = own(seen) - beta * (control(seen) - control(all)),    beta = cov(own, control) / var(control), over the seen items

The correction takes the share rho squared of the variance away, where rho is the correlation of own and control over items. A fixed
beta of 1, which compares with the control alone, can be worse than no correction, so it is fitted.
Source: the standard estimator, such as Owen, Monte Carlo theory, methods and examples, 2013, chapter 8.9.
"""

from __future__ import annotations

from ...evaluation.scoring.estimate import Estimate

__all__ = ["fit_beta", "with_control"]


def fit_beta(own: Estimate, control: Estimate) -> float:
    """Return the covariance of two figures over the variance of the second; 0 where that is 0.

    Args:
        own: A figure.
        control: A figure on the same items.
    """
    covariance = variance = 0.0
    for key, part in control.parts.items():
        if len(part) < 2:
            continue
        # contributions sum to 0 by construction, up to rounding
        scale = len(part) / (len(part) - 1)
        variance += scale * float(part @ part)
        if key in own.parts:
            covariance += scale * float(part @ own.parts[key])
    return covariance / variance if variance > 0 else 0.0


def with_control(own: Estimate, control: Estimate, whole: Estimate) -> Estimate:
    """Return what a figure is on all items.

    Args:
        own: It, on the items that were seen.
        control: Another figure on the same items.
        whole: The other figure on all items.
    """
    beta = fit_beta(own, control)
    return own - (control * beta) + whole * beta
