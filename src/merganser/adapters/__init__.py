"""LoRA adapters in the format of peft: read them and apply them to the weights of a checkpoint.

adapter = open_adapter("path/to/adapter")
adapter.check_fits(checkpoint.tensors)
with Reader() as reader:
    changed = adapter.apply("model.layers.0.self_attn.q_proj.weight", weight, reader)
"""

from .lora import Adapter, LowRank, open_adapter

__all__ = ["Adapter", "LowRank", "open_adapter"]
