"""The methods for shrinking a mixture, one file each."""

from . import hc_smoe, merge_moe, msmoe, ream, reap, sub_moe

__all__ = ["METHODS"]

METHODS = {own.METHOD.name: own.METHOD for own in (reap, ream, msmoe, hc_smoe, sub_moe, merge_moe)}
"""By name; the first one prunes."""
