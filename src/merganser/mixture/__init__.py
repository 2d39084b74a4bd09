"""Build mixtures of experts from dense models."""

from .recipe import MixtureRecipe, load_mixture
from .run import mix, plan_mixture

__all__ = ["MixtureRecipe", "load_mixture", "mix", "plan_mixture"]
