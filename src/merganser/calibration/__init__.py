"""Statistics of what a model computes on text, one transformer block at a time."""
