"""The meaning of tensor names: layers, roles and tied weights; and how configs are changed to fit.

Structure is inferred from names, shapes and config. Nothing here reads weights, and nothing here imports torch.
"""

from __future__ import annotations

from .infer import Anatomy, infer_anatomy
from .roles import Part, Position, Role
from .settings.config import is_tied, set_config_dtype, set_tied
from .slicing import SlicedConfig, slice_config

__all__ = [
    "Anatomy",
    "Part",
    "Position",
    "Role",
    "SlicedConfig",
    "infer_anatomy",
    "is_tied",
    "set_config_dtype",
    "set_tied",
    "slice_config",
]
