"""Sections of a plan, each the data about one subject: census, sidecars, vocabulary, permutation, and others."""
