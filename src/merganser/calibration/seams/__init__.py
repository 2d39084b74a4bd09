"""Stacked models at their seams: how far what layers receive is from what they received in the models they came from."""

from .measure import SeamReport, SeamState, inspect_seams

__all__ = ["SeamReport", "SeamState", "inspect_seams"]
