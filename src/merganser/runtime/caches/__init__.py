"""Caches by name, one file per method."""

from __future__ import annotations

from ..layer import RunningLayer
from .d2o import D2O
from .ems import EMS
from .knorm import Knorm
from .kvmerger import KVMerger
from .minicache import MiniCache
from .razor_attention import RazorAttention
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM
from .task_kv import TaskKV

__all__ = ["LAYERS"]

LAYERS: dict[str, type[RunningLayer]] = {
    "d2o": D2O,
    "ems": EMS,
    "knorm": Knorm,
    "kvmerger": KVMerger,
    "minicache": MiniCache,
    "razor_attention": RazorAttention,
    "snapkv": SnapKV,
    "streaming_llm": StreamingLLM,
    "task_kv": TaskKV,
}
