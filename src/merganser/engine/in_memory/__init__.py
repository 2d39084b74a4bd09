"""Merges whose result stays in memory: plans as state dicts, state dicts, and averages while a model trains."""
