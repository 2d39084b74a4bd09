"""Learn coefficients by gradients of a loss of the whole merged model, with one transformer block in memory at a time.

A method says how weights are made of coefficients (its own function) and what the loss is (`merganser.method.Learning`).
Everything else is here. Each step forms the merged model block by block out of base and models, runs a few sequences of
every model's data through it, visits the blocks from the last to the first for the exact gradients of all weights
(`calibration.reverse`), and turns these into gradients of the coefficients, for Adam or a method's own steps.
"""

from .plan import Descent, LearningPlan, descent_of, learnt_coefficients, plan_learning
from .run import check_learning, learn_coefficients

__all__ = [
    "Descent",
    "LearningPlan",
    "check_learning",
    "descent_of",
    "learn_coefficients",
    "learnt_coefficients",
    "plan_learning",
]
