"""Parts or modules of several tasks in one model, in shares that gates give per token or per text: one mechanism, several systems."""

from .model import GatedModel
from .settings import KINDS, GateSettings, settings_of

__all__ = ["KINDS", "GateSettings", "GatedModel", "settings_of"]
