"""Adapters in the format of peft: open them, and read the weights of a checkpoint with one applied.

checkpoint = open_model("path/to/model", "path/to/adapter")
with checkpoint.reader() as reader:
    weight = reader.tensor(checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"])
"""

from .adapter import Adapter, LowRank, is_adapter, open_adapter
from .apply import with_adapter
from .open import open_model, open_reference, published_name, split_reference

__all__ = [
    "Adapter",
    "LowRank",
    "is_adapter",
    "open_adapter",
    "open_model",
    "open_reference",
    "published_name",
    "split_reference",
    "with_adapter",
]
