"""Sums over what the matrices of a block receive."""
