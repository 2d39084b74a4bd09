"""Calibrate within a merge: block by block, on what the merged blocks before compute."""

from .walk import calibrate_within

__all__ = ["calibrate_within"]
