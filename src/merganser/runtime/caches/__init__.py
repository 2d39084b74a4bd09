"""Caches by name, one file per method."""

from __future__ import annotations

from .d2o import D2O
from .ems import EMS
from .knorm import Knorm
from .kvmerger import KVMerger
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM

__all__ = ["LAYERS"]

LAYERS = {
    "d2o": D2O,
    "ems": EMS,
    "knorm": Knorm,
    "kvmerger": KVMerger,
    "snapkv": SnapKV,
    "streaming_llm": StreamingLLM,
}
