"""Sidecars: what an output stores besides the merged ("shared") model to restore each task's model.

sidecars/index.json             the tasks, their files, and how each tensor is restored
sidecars/shared.safetensors     parts that all tasks need, if there are any
sidecars/TASK/parts.safetensors the task's own parts; `model.layers.0.mlp.up_proj.weight.mask` is the part `mask`
sidecars/TASK/...               files of the task's checkpoint that differ from those of the output
"""
