"""Fusion by training: the recipe, what each source teaches, the trainer, and the run."""
