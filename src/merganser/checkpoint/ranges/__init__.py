"""Files of the Hub that are read by ranges of their bytes, so that no copy of them lies on the disk."""
