"""A model's forward, one block at a time: filled from a checkpoint, run, and emptied again."""
