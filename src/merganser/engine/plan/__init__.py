"""The plan of a merge as data: every tensor, its inputs, sizes, memory and files, from file headers alone."""

from .plan import Plan
from .tensor import PlannedTensor

__all__ = ["Plan", "PlannedTensor"]
