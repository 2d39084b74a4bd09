"""Carry out a plan: tasks, workers, buffers, the growing output and its journal."""
