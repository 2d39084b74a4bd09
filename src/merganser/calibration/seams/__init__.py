"""Stacked models at their seams: how far what layers receive is from what they received in the models they came from."""

from .heal import Healing, heal
from .measure import SeamReport, SeamState, inspect_seams

__all__ = ["Healing", "SeamReport", "SeamState", "heal", "inspect_seams"]
