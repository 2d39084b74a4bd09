"""Permute models to a reference before they are merged: find the permutations, keep them, read the tensors through them."""
