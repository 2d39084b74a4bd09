"""Adapters: what LoRA fine-tunes change in a checkpoint, as peft writes them.

adapter = open_adapter("path/to/adapter")
adapter.check_fits(checkpoint.tensors)
with Reader() as reader:
    changed = adapter.apply("model.layers.0.self_attn.q_proj.weight", weight, reader)
"""

from .lora import Adapter, LowRank, open_adapter

__all__ = ["Adapter", "LowRank", "open_adapter"]
