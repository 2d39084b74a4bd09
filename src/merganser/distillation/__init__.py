"""Teach one model what others say: what a source predicts on text is stored once, and a student is trained on it."""

from .blending.run import blend_answers
from .blending.summary import Blended
from .cache import cache_logits
from .disperse import Dispersed, disperse
from .format import LogitCache, open_cache
from .training.recipe import load_fusion
from .training.run import Fused, fuse

__all__ = [
    "Blended",
    "Dispersed",
    "Fused",
    "LogitCache",
    "blend_answers",
    "cache_logits",
    "disperse",
    "fuse",
    "load_fusion",
    "open_cache",
]
