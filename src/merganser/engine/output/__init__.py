"""The growing output: its folder and journal, the lock on the target, what in a folder is ours, and the finish."""
