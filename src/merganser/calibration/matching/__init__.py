"""Compare the units of two models by what they compute on the same tokens, one transformer block at a time."""

from .run import correlate

__all__ = ["correlate"]
