"""Quantised weights: one file per way of storing them, each read as float32 while it is merged."""
