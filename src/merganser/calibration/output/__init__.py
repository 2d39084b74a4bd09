"""Folders that a calibration writes, and how an interrupted one continues."""
