"""Run a plan: groups of tensors, tasks, workers and buffers."""
