"""Merge methods that work on the low-rank factors of adapters, as they were trained; one file each.

A method of the same name in `methods/` merges whole models; `add_weighted_adapter` and `lora_lego` merge adapters alone.
"""
