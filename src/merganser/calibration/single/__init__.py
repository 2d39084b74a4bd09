"""Calibrate a single model."""
