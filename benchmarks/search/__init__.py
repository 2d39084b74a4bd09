"""Measure searches: what a trial costs, what waves of items save, and whether CMA-ES finds more than chance."""
