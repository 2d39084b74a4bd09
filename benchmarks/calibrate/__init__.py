"""How long calibration takes, how much memory, and how right a merge with it is, beside an ordinary forward and FusionBench."""
