"""Plan a calibration: what it will write, and what it takes; no weights are read."""
