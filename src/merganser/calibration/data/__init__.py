"""Data to calibrate on: read from files or data sets, made into samples, and batched."""
