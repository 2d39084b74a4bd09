"""Tensors that are computed while they are read, from tensors of the files."""
