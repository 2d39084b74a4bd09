"""Experts of unequal depth and width, with one tokenizer, as one model: MergeME's mixture of heterogeneous experts."""

from .model import UnequalModel
from .settings import MixtureSettings

__all__ = ["MixtureSettings", "UnequalModel"]
