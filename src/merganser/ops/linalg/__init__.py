"""Maths on matrices: Gram matrices, spectra and their cuts, least squares, and what minimises interference."""
