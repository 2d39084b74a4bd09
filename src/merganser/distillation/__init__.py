"""Train one model on what others predict: predictions of a source on text are stored once, and a student is trained on them."""

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
