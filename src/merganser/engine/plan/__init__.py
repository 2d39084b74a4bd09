"""What a merge will do, as data: every tensor, its inputs, sizes, memory and files, known from headers alone."""

from .plan import Plan
from .tensor import PlannedTensor

__all__ = ["Plan", "PlannedTensor"]
